"""Beginnings of texts of many kinds, for real models."""

PROMPTS = [
    "The capital of France is", "Water boils at", "def fibonacci(n):", "Once upon a time",
    "The three primary colours are", "In 1969,", "Dear Sir or Madam,", "1, 2, 3, 4,",
    "The cat sat on the", "Photosynthesis is", "To make bread you need", "import numpy as np",
    "The largest ocean is", "My favourite book is", "Q: What is 12 times 12?\nA:", "SELECT name FROM",
    "Shakespeare wrote", "The speed of light is", "Once the war was over,", "Roses are red,",
]  # fmt: skip
