from .lska import LSKA
from .lska_neck import LSKANeck
from .lska_van import LSKAVAN

__all__ = ['LSKA', 'LSKAVAN', 'LSKANeck']
