"""luks-csi: encrypted volumes for Kubernetes on any storage. `docs/architecture.md` shows the layers."""

__version__ = "0.1.0"
