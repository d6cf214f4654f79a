"""Runs a script, which must import no compiler.

python tests/no_compiler.py SCRIPT FLAG ...
"""

import runpy
import sys

del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not sys.modules.keys() & {"triton", "torch._dynamo"}
