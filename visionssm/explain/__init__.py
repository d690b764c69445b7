"""What a model looks at: the hidden attention of selective scans, exact, for every model of the zoo; docs/explain.md is the guide.

Imported on its own, `import visionssm.explain`; `import visionssm` does not load it.
"""

from .attention import Attention
from .class_attribution import attribution
from .evaluation import METHODS, perturbation_auc, segmentation_scores
from .gradients import gradients
from .picture import overlay, show
from .products import raw, rollout, rollout_row
from .receptive_field import effective_receptive_field
from .recording import Tape, record

__all__ = [
    "METHODS",
    "Attention",
    "Tape",
    "attribution",
    "effective_receptive_field",
    "gradients",
    "overlay",
    "perturbation_auc",
    "raw",
    "record",
    "rollout",
    "rollout_row",
    "segmentation_scores",
    "show",
]
