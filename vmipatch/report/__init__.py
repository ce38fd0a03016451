"""Renderers: table and JSON.  They print what they are given and compute nothing."""
