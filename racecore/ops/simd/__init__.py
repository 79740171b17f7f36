"""Vectors in compiled code: types, elementary functions, half precision, code generation, tiles,
products.
"""
