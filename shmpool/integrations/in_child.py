"""Run, by its path, in a process that is being spawned by a process in which shmpool is installed.

That comes before anything else: the child has not been given its parent's ``sys.path``, and has not imported the main
module, whose first lines may bind the names that are to be replaced.  See ``_send_to_children`` in ``install.py``.
"""

import os
import sys

folder = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, folder)
try:
    from shmpool.integrations.install import install
finally:
    sys.path.remove(folder)

install()
