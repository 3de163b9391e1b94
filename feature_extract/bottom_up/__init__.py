"""Bottom-up attention (Anderson et al. 2018, arXiv 1707.07998) by torchvision's operations: a C4 Faster R-CNN."""
