"""The parameters of Ceph-CSI's classes, on the backend that they are for and on others."""

from typing import Any

import pytest

from csi_driver.model.errors import InvalidArgument
from csi_driver.model.volume import VolumeParameters
from csi_driver.volumes.parameters import read_parameters

DOCUMENT = {
    "clusterID": "ceph-cluster",
    "pool": "rbd",
    "imageFeatures": "layering",
    "csi.storage.k8s.io/provisioner-secret-name": "csi-rbd-secret",
    "csi.storage.k8s.io/provisioner-secret-namespace": "default",
    "csi.storage.k8s.io/controller-expand-secret-name": "csi-rbd-secret",
    "csi.storage.k8s.io/controller-expand-secret-namespace": "default",
    "csi.storage.k8s.io/node-stage-secret-name": "csi-rbd-secret",
    "csi.storage.k8s.io/node-stage-secret-namespace": "default",
    "csi.storage.k8s.io/fstype": "ext4",
    "encrypted": "true",
    "encryptionKMSID": "vault-1",
}


def test_the_class_of_the_document_is_read_as_it_is() -> None:
    assert read_parameters(DOCUMENT, "rbd") == VolumeParameters(
        encrypted=True,
        kms_id="vault-1",
        cluster_id="ceph-cluster",
        pool="rbd",
        image_features=("layering",),
        fs_type="ext4",
    )


@pytest.mark.parametrize("backend", ["loopfile", "lvm", ""])
def test_other_backends_ignore_what_is_for_ceph(backend: str) -> None:
    odd = {"dataPool": "?", "mounter": "rbd-nbd", "mapOptions": "whatever", "pool": "a/b"}
    assert read_parameters(DOCUMENT | odd, backend) == VolumeParameters(
        encrypted=True, kms_id="vault-1", fs_type="ext4"
    )


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("dataPool", "ec-data", "data_pool", "ec-data"),
        ("mounter", "rbd", "mounter", "rbd"),
        ("imageFeatures", "exclusive-lock, layering", "image_features", ("layering", "exclusive-lock")),
        (
            "imageFeatures",
            "fast-diff,object-map,exclusive-lock",
            "image_features",
            ("exclusive-lock", "object-map", "fast-diff"),
        ),
        ("mapOptions", "", "map_options", ()),
        (
            "mapOptions",
            "ms_mode=secure,osd_request_timeout=60",
            "map_options",
            ("ms_mode=secure", "osd_request_timeout=60"),
        ),
        (
            "mapOptions",
            "krbd:lock_on_read,queue_depth=1024;nbd:try-netlink",
            "map_options",
            ("lock_on_read", "queue_depth=1024"),
        ),
        ("mapOptions", "nbd:try-netlink", "map_options", ()),
    ],
)
def test_a_parameter_of_ceph_means_what_it_says(name: str, text: str, field: str, value: Any) -> None:
    assert getattr(read_parameters({name: text}, "rbd"), field) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("clusterID", ""),
        ("pool", "a/b"),
        ("pool", "-x"),
        ("dataPool", ""),
        ("imageFeatures", ""),
        ("imageFeatures", "journaling"),
        ("imageFeatures", "layering,object-map"),
        ("imageFeatures", "exclusive-lock,fast-diff"),
        ("mounter", "rbd-nbd"),
        ("mapOptions", "exclusive"),
        ("mapOptions", "ro"),
        ("mapOptions", "share"),
        ("mapOptions", "secret=AQ"),
        ("mapOptions", "lock_on_read=1"),
        ("mapOptions", "ms_mode"),
        ("mapOptions", "ms_mode=none"),
        ("mapOptions", "crush_location=host:a b"),
    ],
)
def test_what_cannot_be_is_refused_and_told(name: str, text: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"the parameter {name} is '.*'; it must be "):
        read_parameters({name: text}, "rbd")
