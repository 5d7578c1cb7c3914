"""`make docs` builds these pages with Sphinx into build/docs."""

from rkan_mmdet import __version__

project = 'rkan_mmdet'
author = 'the authors of rkan_mmdet'
release = __version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.mathjax']
myst_enable_extensions = ['colon_fence']
myst_heading_anchors = 3
# links from a page to a file of the repository are for readers on a code host; Sphinx has no such page
suppress_warnings = ['myst.xref_missing']
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # the docstrings have the types, with shapes
napoleon_use_ivar = True
html_theme = 'furo'
