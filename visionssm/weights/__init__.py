"""Published checkpoints: a table as data, safe reading, download.

`checkpoints()` lists them, `find(name)` is one; `download(name)` is its file and `load_weights(name)` what it holds;
`read_checkpoint` and `select_weights` read any other file as safely. With a model: `timm.create_model(name, pretrained=True)`
or `visionssm.load_checkpoint(model, path)`.
"""

from .cache import DownloadError as DownloadError
from .cache import UnreachableError as UnreachableError
from .cache import fetch as fetch
from .cache import sha256_of as sha256_of
from .loading import download as download
from .loading import load_weights as load_weights
from .reading import read_checkpoint as read_checkpoint
from .reading import select_weights as select_weights
from .table import Checkpoint as Checkpoint
from .table import Family as Family
from .table import checkpoints as checkpoints
from .table import find as find
