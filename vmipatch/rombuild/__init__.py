"""VMI ROMs: specs to images, and any option ROM to what is in it and what is wrong with it.

The writer is :mod:`~vmipatch.rombuild.build`; :mod:`~vmipatch.rombuild.inspect` and
:mod:`~vmipatch.rombuild.check` read images and share no code with it.
"""
