"""Running an artefact: the sampler, its pictures and its timings."""

from fewstep.runtime.sampler import Sampler
from fewstep.runtime.student import Student, load

__all__ = ["Sampler", "Student", "load"]
