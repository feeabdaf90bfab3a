"""Errors in the words of whoever asked: the driver speaks to Kubernetes, and here people ask, who have options."""

from typing import Final

WORDS: Final = (
    # Secrets.
    (
        "to the secret that csi.storage.k8s.io/node-stage-secret-name and -namespace of its StorageClass name",
        "to the folder of --secret-dir, or give its passphrase with --passphrase-file",
    ),
    (
        "name the image's secret in csi.storage.k8s.io/provisioner-secret-name and -namespace of the StorageClass too",
        "give the image's passphrase with --passphrase-file or --secret-dir",
    ),
    ("and CreateVolume brought neither", "and there is neither"),
    ("the passphrase in the secret opens", "the passphrase opens"),
    (
        "put the passphrase it was last given back into the secret",
        "give the passphrase it was last given",
    ),
    ("and the request brought no secret", "and no passphrase was given"),
    ("or name a node-expand secret in its StorageClass", "or give its passphrase with --passphrase-file"),
    ("as Kubernetes has them", "with one slash"),
    # Parameters.
    (
        'the StorageClass says encrypted "false"; set it to "true" and name the image\'s secret',
        "an encrypted volume was not asked for; add --encrypted and the image's passphrase",
    ),
    ('the StorageClass says encrypted "true"', "an encrypted volume was asked for"),
    ("the StorageClass parameter", "the --parameter"),
    ("the StorageClass says", "--parameter says"),
    ("correct the StorageClass", "correct that"),
    ("choose a smaller pbkdfMemory", "choose a smaller --parameter pbkdfMemory"),
    ("with mountOptions", "with --mount-option"),
    ("the PersistentVolume of volume", "the context of volume"),
    ("correct the PersistentVolume", "call again"),
    # What uses a volume.
    ("give the driver's pod more memory", "give the driver more memory"),
    ("end the volume's pods and start them anew", "end what uses the volume, unpublish and publish it"),
    ("end the volume's pods", "end what uses the volume"),
    ("end its pods, and unstage it if Kubernetes does not", "unpublish and unstage it"),
    ("then start the pod anew: it has the old size until then", "then expand it again: it has the old size until then"),
    ("a pod's must be another one", "choose another one"),
    ("the access mode ReadWriteOncePod", "the access mode RWOP"),
    ("end that pod first", "unpublish it there first"),
    (", as kubelet does for block volumes", ""),
    # Images.
    ("unless the settings allow it", "unless --allow-local is given"),
    ("raise the limit if the image", "raise --limit if the image"),
    ("image or raise the limit", "image or raise --limit"),
    ("by standard input; raise the limit", "by standard input; raise --limit"),
)
"""Words of the driver, and those of the command line in their place; the first ones that fit count."""


def for_people(sentence: str) -> str:
    """An error of the driver as the command line tells it."""
    for theirs, ours in WORDS:
        sentence = sentence.replace(theirs, ours)
    return sentence
