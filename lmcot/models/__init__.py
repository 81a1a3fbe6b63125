"""Language models: their sources, their forward passes and what they generate."""

from transformers import utils

# Where scikit-learn and SciPy are installed, transformers imports them (and pandas with them) into
# every process: for speculative decoding and for object detection, of which lmcot does neither.
# That would be a quarter of what an actor costs to start.
utils.is_sklearn_available = utils.is_scipy_available = lambda: False
