"""Training recipes: ResNets, small image data sets and a data-parallel training loop to measure gradient exchange with.

``qcomm train`` is the command-line face of this package; ``qcomm.recipes.train.train`` is the loop itself.
"""
