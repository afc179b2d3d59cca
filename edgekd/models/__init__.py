"""Networks: multi-exit students, papers' networks, and any timm or torchvision classifier with exits."""
