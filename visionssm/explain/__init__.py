"""What a model looks at: the hidden attention of selective scans, exact, for every model of the zoo; docs/explain.md is the guide.

Imported on its own, `import visionssm.explain`; `import visionssm` does not load it.
"""

from .attention import Attention
from .class_attribution import attribution
from .products import raw, rollout, rollout_row
from .recording import Tape, record

__all__ = ["Attention", "Tape", "attribution", "raw", "record", "rollout", "rollout_row"]
