"""Leaves out the docstrings' examples of modules whose framework is not installed."""

import importlib.util

FRAMEWORKS = ("accelerate", "lightning", "torchft", "transformers")
collect_ignore = [f"qcomm/integrations/{name}.py" for name in FRAMEWORKS if importlib.util.find_spec(name) is None]
