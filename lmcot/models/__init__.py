"""Language models: their sources, their forward passes and what they generate."""

from lmcot.process import spare_imports

spare_imports()  # in a process that was prepared; it changes nothing in any other
