"""Layer-wise federated self-supervised learning on edge devices (LW-FedSSL, arXiv 2401.11647)."""

__version__ = "0.1.0"
