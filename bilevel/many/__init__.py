"""Many small games, or many tasks of one leader, played as one: composed around what plays a single game."""

from bilevel.many.games import Games
from bilevel.many.games_of_ranks import GamesOfRanks
from bilevel.many.task_batch import TaskBatch
from bilevel.many.tasks import Adapted, Tasks
from bilevel.many.tasks_of_ranks import TasksOfRanks

__all__ = ["Adapted", "Games", "GamesOfRanks", "TaskBatch", "Tasks", "TasksOfRanks"]
