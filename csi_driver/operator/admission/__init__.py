"""Admission: the Kubernetes API asks us before it lets certain objects be made, changed or deleted."""
