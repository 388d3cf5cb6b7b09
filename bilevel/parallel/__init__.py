"""One game in many processes, each with a part of every batch: composed around what plays it in one."""

from bilevel.parallel.data_parallel import DataParallel
from bilevel.parallel.game import ParallelGame

__all__ = ["DataParallel", "ParallelGame"]
