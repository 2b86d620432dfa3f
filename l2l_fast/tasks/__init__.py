from l2l_fast.tasks.base import Instances, Task
from l2l_fast.tasks.quadratic import Quadratic

__all__ = ["Instances", "Quadratic", "Task"]
