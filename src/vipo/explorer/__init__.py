"""``vipo maps --ui``: maps of pictures and clips while settings change, and what a run's credit was, sample by sample.

==================== ==================================================================================
``settings``         what can be chosen, what of it changed, and the recipe lines that say the same
``look``             a file and settings to components, map, overlay and shares of variance
``opened``           a run's folder to iterations, groups and samples, with every map that there is
``start``            what is there when the page is opened
``page``, ``serve``  both in a browser: the only files that know the UI library, extra ``ui``
==================== ==================================================================================
"""
