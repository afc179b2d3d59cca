"""Networks: multi-exit students, networks of papers, and any timm or torchvision classifier with exits."""
