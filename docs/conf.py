"""The documentation as a site: ``make docs``.

The source folder is the whole repository. So a link from a page to a file outside ``docs/`` is the same relative path
on GitHub and here, and no link is rewritten.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "namex_hf"
root_doc = "docs/index"
include_patterns = [
    *("docs/*.md", "patches/README.md", "experiments/*/README.md", "namex_hf/packaged/PROVENANCE.md"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
]
exclude_patterns = [".*", "build", "dist", "out", "packaged/work", "tests", "namex_hf/packaged/tiny*"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_argparse_cli"]
myst_heading_anchors = 4
default_role = "code"  # in docstrings `name` is code, as in Markdown
napoleon_use_ivar = True
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = "namex_hf"
