"""python -m bake"""

from bake.cli import run

run()
