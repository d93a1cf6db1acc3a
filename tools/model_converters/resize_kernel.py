"""The old name of resize_weights.py, for one release."""

import sys

from resize_weights import main

if __name__ == '__main__':
    print('resize_kernel.py is called resize_weights.py now', file=sys.stderr)
    sys.exit(main())
