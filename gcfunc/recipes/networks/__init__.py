"""The networks of the recipes: torchvision's where it has them, changed as the reference has them.

Only a recipe's training imports this package, as it needs torchvision.
"""
