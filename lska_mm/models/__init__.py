from .lska import LSKA
from .lska_van import LSKAVAN

__all__ = ['LSKA', 'LSKAVAN']
