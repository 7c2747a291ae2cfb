"""Everything that is measured. To add a work: a `Work` in one of the lists."""

from .work import Work
from .works_calls import CALLS
from .works_joblib import JOBLIB

WORKS: dict[str, Work] = {work.name: work for work in CALLS + JOBLIB}
