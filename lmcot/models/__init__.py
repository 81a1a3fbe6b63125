"""Language models: their sources, their forward passes and what they generate."""

from lmcot.process import spare_imports

spare_imports()  # only has an effect in a prepared process
