# Everything starts here: `make help`. A fresh machine needs git, make and Python 3.11 or newer, and root or sudo.

PYTHON ?= python3
UV ?= uv
PY := .venv/bin/python
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/luks-csi
CSI_SANITY := $(CACHE)/bin/csi-sanity-v5.6.0
STUBS := csi_driver/keys/kmsv2_pb2.py

# The binaries of a cluster, named after what they are built from.
KUBERNETES_BIN := $(CACHE)/kubernetes-$(shell cat tests/cluster/go/*/go.* | sha256sum | cut -c1-12)

# What `make bench` measures beside: the commit before identities replaced names, its stubs built by today's tools.
BENCH_COMMIT := 5d4dae4fecc2791e2f89e14a6f9e953ff3d51040
BENCH_BASE := $(CACHE)/bench-$(BENCH_COMMIT)

# And what `make bench-images` does: the commit before clones left out digests that nobody reads.
BENCH_IMAGES_COMMIT := e5454af0070a5155803b5fc5a1cd358eb739fb6a
BENCH_IMAGES_BASE := $(CACHE)/bench-$(BENCH_IMAGES_COMMIT)

# A Vault and an AWS KMS for the tests of keys, each of its own modules.
VAULT_BIN := $(CACHE)/bin/vault-$(shell cat tests/keys/go/vault/* | sha256sum | cut -c1-12)
LOCAL_KMS_BIN := $(CACHE)/bin/local-kms-$(shell cat tests/keys/go/local-kms/* | sha256sum | cut -c1-12)
KEY_SERVERS := $(VAULT_BIN) $(LOCAL_KMS_BIN)

# The other side of CSI-Addons and its manifests, and the attacher that it wants.
CSI_ADDONS_BIN := $(CACHE)/csi-addons-$(shell cat tests/cluster/addons/*/go.* | sha256sum | cut -c1-12)

# Suites that draw at random take these.
export SEED COUNT FROM BACKEND
export CSI_SANITY KUBERNETES_BIN VAULT_BIN LOCAL_KMS_BIN BENCH_BASE BENCH_IMAGES_BASE
cluster-test: export CSI_ADDONS_BIN := $(CSI_ADDONS_BIN)
cluster-test: export CLUSTER_CEPH := yes

# On the host if that has device-mapper, else in the guest. A page fault is dear there: memory, once had, is kept, but
# where it is measured. The long image suites take more room and time.
MEASURED_GUEST := $(PY) -m tests.machine.guest --env SEED --env COUNT --env FROM --env CSI_SANITY --env VAULT_BIN --env LOCAL_KMS_BIN
BENCH_GUEST := $(MEASURED_GUEST) --env BENCH_BASE --disk 32G --timeout 7200
GUEST_FOR := $(MEASURED_GUEST) --env MALLOC_MMAP_THRESHOLD_=33554432 --env MALLOC_TRIM_THRESHOLD_=268435456
GUEST := $(GUEST_FOR) --
LONG_GUEST := $(GUEST_FOR) --disk 32G --timeout 7200 --
# The guest's root is read-only: no cache folder there.
# A test that its own limit of time does not end, or whose clean-up hangs, tells where it is and ends all.
MACHINE_PYTEST := $(PY) -m pytest -p no:cacheprovider -o faulthandler_timeout=1800 -o faulthandler_exit_on_timeout=true

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help backends-test move-kills ceph-test demo shell test test-danger test-machine test-servers check sanity faults crashes storm danger canary cluster-test keys-test \
    keys-kills bench bench-backends bench-data bench-keys bench-images format clean venv system lock fuzz images images-demo images-matrix images-kills images-hostile \
    images-limits images-random operator-test operator-random bench-operator

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: venv system ## an encrypted volume from creation to clean-up, on real dm-crypt
	@$(GUEST) $(PY) -m tests.machine.demo

shell: venv system ## a guest with device-mapper, luks-csi and a disk, to try things by hand
	@$(PY) -m tests.machine.shell

test: check $(CSI_SANITY) $(KUBERNETES_BIN) $(KEY_SERVERS) ## every test, seeded handfuls of the long ones
	@tools/system.sh cluster
	@$(MAKE) -j3 --output-sync=target --no-print-directory test-danger test-machine test-servers

# Each guest has one processor: the device tests run in two at once, and beside them what waits for servers. Those of
# contract talk gRPC and start programs, which gRPC's fork handlers may end (findings/grpcio-thread-in-fork.sh).
DANGER := $(wildcard tests/machine/test_danger_*.py) $(addprefix tests/machine/test_,storm.py canary.py)
DANGER_IN_GROUP := $(addprefix tests/machine/test_danger_,selftest.py group.py elsewhere.py killed.py)
UDEV := tests/machine/test_udev.py
BACKENDS := $(addprefix tests/backends/test_,life.py::test_a_volume_is_made_used_restarted_enlarged_given_another_key_and_deleted \
    conformance.py::test_a_volume_is_blank_and_as_long_as_asked_for conformance.py::test_foreign_storage_of_the_name_is_left_alone \
    lvm.py::test_a_backend_that_clears_nothing_is_noticed lvm.py::test_a_pool_above_its_limit_takes_nothing_new_and_says_so \
    move.py::test_a_volume_goes_there_and_back_byte_by_byte \
    move.py::test_a_device_that_was_free_while_its_move_was_stopped_is_read_once_more move_command.py)
# A handful of `make operator-test`.
OPERATOR := $(addprefix tests/operator/test_,images.py upload.py admission.py \
    random.py::test_everything_converges_while_all_are_killed \
    kills.py::test_copies_of_a_lost_node_are_made_anew_and_it_may_come_back_or_go_for_good \
    kills.py::test_what_was_lost_with_its_last_copy_is_told_and_never_made_anew \
    faults.py::test_who_is_cut_off_for_a_while_misses_nothing \
    faults.py::test_what_is_being_cloned_is_not_deleted_before_that_has_ended \
    faults.py::test_an_image_that_somebody_made_by_hand_is_not_touched)
test-danger: venv system
	$(GUEST) $(MACHINE_PYTEST) $(DANGER)

test-machine: venv system
	$(GUEST) $(MACHINE_PYTEST) $(filter-out $(DANGER) $(UDEV),$(wildcard tests/machine/test_*.py))

test-servers: venv system $(KUBERNETES_BIN) $(KEY_SERVERS)
	GRPC_ENABLE_FORK_SUPPORT=0 $(PY) -m pytest tests/contract
	$(PY) -m pytest tests/keys
	$(GUEST_FOR) --udev -- $(MACHINE_PYTEST) $(UDEV)
	$(GUEST) $(MACHINE_PYTEST) $(BACKENDS)
	$(GUEST_FOR) --env BACKEND=lvm-thick -- $(MACHINE_PYTEST) $(DANGER_IN_GROUP)
	$(PY) -m pytest $(OPERATOR)
	$(PY) -m tests.cluster tests/cluster/test_smoke.py tests/cluster/test_examples.py

check: venv system ## linters, types, layers, unit tests
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports
	$(PY) -m pytest -n 2 tests/unit

sanity: venv system $(CSI_SANITY) ## csi-sanity against the server, mount and block; BACKEND=lvm-thick or lvm-thin
	@$(GUEST_FOR) --env BACKEND -- $(PY) -m tests.machine.sanity

ceph-test: export BACKEND := rbd
ceph-test: venv system $(CSI_SANITY) ## the backend rbd on a Ceph: conformance, nodes, life, a dead machine, csi-sanity
	@tools/system.sh ceph
	@code=0; for command in 'tests.backends' 'tests.machine.sanity'; do \
	    $(PY) -m tests.backends.on_ceph -- $(PY) -m $$command || code=1; \
	done; $(PY) -m pytest tests/backends/test_rbd_clients.py tests/backends/test_rbd_cluster.py tests/backends/test_rbd_guests.py || code=1; exit $$code

backends-test: venv system ## the conformance suite of backends; BACKEND=loopfile, lvm-thick or lvm-thin for one
	@$(GUEST_FOR) --env BACKEND -- $(PY) -m tests.backends

move-kills: venv system ## kill -9 at each step of a move to another backend; BACKEND=lvm-thick, lvm-thin or rbd for one
	@[ '$(BACKEND)' != rbd ] || tools/system.sh ceph
	@$(if $(filter rbd,$(BACKEND)),$(PY) -m tests.backends.on_ceph,$(GUEST_FOR) --env BACKEND --disk 32G --timeout 21600) -- \
	    $(PY) -m tests.backends.move_kills

faults: venv system ## every command and record write fails or is killed; BACKEND=lvm-thick, lvm-thin, rbd or csi, FROM=case
	@[ '$(BACKEND)' != rbd ] || tools/system.sh ceph
	@$(if $(filter rbd,$(BACKEND)),$(PY) -m tests.backends.on_ceph,$(GUEST_FOR) --env BACKEND --timeout 21600) -- \
	    $(PY) -m tests.machine.faults

crashes: venv system ## kernel crashes at random moments; BACKEND=lvm-thick or lvm-thin
	@$(PY) -m tests.machine.crashes

storm: venv system ## many callers, kills, stops, a bystander
	@$(PY) -m tests.machine.storm

danger: venv system ## what lost data in the field; BACKEND=lvm-thick, lvm-thin, rbd or csi
	@[ '$(BACKEND)' != rbd ] || tools/system.sh ceph
	@$(if $(filter rbd,$(BACKEND)),$(PY) -m tests.backends.on_ceph,$(GUEST_FOR) --env BACKEND --timeout 7200) -- \
	    $(PY) -m tests.machine.danger

canary: venv system ## no key byte leaves its place
	@$(GUEST) $(PY) -m tests.machine.canary

images: venv system ## the image suites, a line of each
	@code=0; for suite in demo limits kills hostile random matrix; do \
	    said=$$($(MAKE) --no-print-directory images-$$suite) || code=1; \
	    echo "$$said" | sed -n "\$$s/^\(images-demo: \)*/images-$$suite: /p"; \
	done; exit $$code

images-demo: venv system ## 1 GiB: encrypted, opened, decrypted, copied, watched
	@$(GUEST) $(PY) -m tests.machine.images_demo

images-matrix: venv system ## formats, sizes, every choice of encryption; opened by cryptsetup
	@$(LONG_GUEST) $(PY) -m tests.machine.image_matrix

images-kills: venv system ## kill -9 in each operation, sources that change
	@$(LONG_GUEST) $(PY) -m tests.machine.image_kills

images-hostile: venv system ## hostile files and addresses, watched by the kernel
	@$(GUEST) $(PY) -m tests.machine.image_hostile

images-random: venv system ## images that qemu makes with random options, against qemu-img; as root
	@$(PY) -m tests.machine.image_random

fuzz: venv system .venv/fuzz ## every header parser under atheris, ten minutes each; TARGET=vhdx SECONDS=60 for less
	@mkdir -p build/fuzz; code=0; for target in $(or $(TARGET),$$($(PY) -m tests.fuzz_targets)); do \
	    $(PY) -m tests.fuzz $$target $(or $(SECONDS),600) >build/fuzz/$$target.log 2>&1 || code=1; \
	    echo "$$target: $$(sed -n 's/^stat:://; /^Done\|^peak_rss\|^SUMMARY/p' build/fuzz/$$target.log | tr '\n' ' ')"; \
	done; exit $$code

images-limits: venv system ## several at once, full disks
	@$(GUEST) $(PY) -m tests.machine.image_limits

keys-test: venv system $(KUBERNETES_BIN) $(KEY_SERVERS) ## key sources against real servers, and on real dm-crypt
	@tools/system.sh cluster
	@$(PY) -m tests.keys.suite $(GUEST)

keys-kills: venv system ## every step of a change of keys, volume keys too, fails, is killed, or the power goes
	@$(GUEST) $(PY) -m tests.machine.keys_kills
	@$(GUEST) $(PY) -m tests.machine.conversion_kills
	@$(GUEST) $(PY) -m tests.machine.keys_cuts

cluster-test: venv $(KUBERNETES_BIN) $(CSI_ADDONS_BIN) ## a real Kubernetes; ONLY="longhorn nodes" runs some
	@tools/system.sh cluster
	@tools/system.sh ceph
	@$(PY) -m tests.cluster $(or $(ONLY:%=tests/cluster/test_%.py),tests/cluster)

operator-test: venv $(KUBERNETES_BIN) ## images as Kubernetes objects: operator and agents at a real API
	@tools/system.sh cluster
	@$(PY) -m tests.operator

operator-random: venv $(KUBERNETES_BIN) ## images at random while operator and agents are killed, against a model
	@tools/system.sh cluster
	@$(PY) -m tests.operator.random

bench: venv system $(BENCH_BASE) ## times beside their bounds, and beside an older commit; then with udev
	@code=0; $(BENCH_GUEST) -- $(PY) -m benchmarks || code=1; \
	echo; echo 'with udev:'; $(BENCH_GUEST) --udev -- $(PY) -m benchmarks before || code=1; exit $$code

bench-keys: venv system ## a node with 50 keys of a KMS comes back; a stage with each KMS
	@$(BENCH_GUEST) -- $(PY) -m benchmarks keys

bench-data: venv ## the data path, by fio, beside bare dm-crypt and other choices
	@tools/system.sh data
	@$(BENCH_GUEST) -- $(PY) -m benchmarks data

bench-backends: venv ## encrypted beside plain, fio, 200 volumes on each backend; BACKEND=lvm-thin, rbd or csi, say
	@tools/system.sh data
	@case '$(BACKEND)' in \
	csi) tools/system.sh cluster && $(MAKE) --no-print-directory $(KUBERNETES_BIN) || exit 1; \
	    code=0; $(PY) -m benchmarks.csi || code=1; \
	    $(BENCH_GUEST) --env BACKEND -- $(PY) -m benchmarks backends backends-data backends-many || code=1; exit $$code ;; \
	rbd) tools/system.sh ceph || exit 1; code=0; $(PY) -m benchmarks backends-many || code=1; \
	    $(PY) -m tests.backends.on_ceph -- $(PY) -m benchmarks backends backends-data || code=1; exit $$code ;; \
	*) $(BENCH_GUEST) --env BACKEND -- $(PY) -m benchmarks backends backends-data backends-many ;; \
	esac

bench-images: venv system $(BENCH_IMAGES_BASE) ## the image engine beside cp, qemu-img and cryptsetup
	@$(PY) -m benchmarks.images

bench-operator: venv $(KUBERNETES_BIN) ## a clone as an Image beside the command, idle images, writes of progress
	@tools/system.sh cluster
	@$(PY) -m benchmarks.operator

format: venv ## mend form and what ruff can mend by itself
	.venv/bin/ruff format
	.venv/bin/ruff check --fix

clean: ## remove what was made, except the cache of built test tools
	rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache csi_driver/*/*_pb2* csi_driver/luks/*.so
	find csi_driver tests -name __pycache__ -prune -exec rm -rf {} +

venv: $(STUBS) ## the virtual environment, .venv

system: ## the system packages, those that are missing
	@tools/system.sh

lock: ## requirements/*.txt from pyproject.toml; needs uv
	$(LOCK) --all-extras --group dev -o requirements/dev.txt pyproject.toml
	$(LOCK) --all-extras -c requirements/dev.txt -o requirements/runtime.txt pyproject.toml
	$(LOCK) -c requirements/dev.txt -o requirements/build.txt --group build
	$(LOCK) -o requirements/fuzz.txt --group fuzz

LOCK = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url

.venv/installed: requirements/dev.txt pyproject.toml
	@tools/system.sh python $(PYTHON)
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --require-hashes -r requirements/dev.txt
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

.venv/fuzz: requirements/fuzz.txt .venv/installed
	$(PY) -m pip install --quiet --require-hashes -r requirements/fuzz.txt
	@touch $@

$(STUBS): $(wildcard protos/*.proto) csi_driver/luks/bulk.c hatch_build.py .venv/installed
	$(PY) hatch_build.py

# Built once for every clone, by the Go of the virtual environment: the rename comes last.
GO = env CGO_ENABLED=0 GOBIN=$(CACHE)/go/bin GOCACHE=$(CACHE)/go/build GOMODCACHE=$(CACHE)/go/mod GOPATH=$(CACHE)/go \
    GOFLAGS='-modcacherw -buildvcs=false' GOTOOLCHAIN=local $(CURDIR)/.venv/bin/go

$(CSI_SANITY): | .venv/installed
	mkdir -p $(@D) $(CACHE)/go
	$(GO) install github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@$(lastword $(subst -, ,$(@F)))
	mv $(CACHE)/go/bin/csi-sanity $@

# Kubernetes compares versions: it gets its own from go.mod.
VERSION_OF = $(shell sed -n 's|^.*$(1) \(v[0-9.]*\)$$|\1|p' tests/cluster/go/kubernetes/go.mod | head -n1)
KUBERNETES_VERSION = $(call VERSION_OF,k8s.io/kubernetes)
KUBERNETES_LDFLAGS = -s -w $(foreach pair,gitVersion=$(KUBERNETES_VERSION) gitMajor=1 \
    gitMinor=$(word 2,$(subst ., ,$(KUBERNETES_VERSION))),-X k8s.io/component-base/version.$(pair))

$(VAULT_BIN): SERVER = vault
$(LOCAL_KMS_BIN): SERVER = local-kms
$(KEY_SERVERS): | .venv/installed
	mkdir -p $(@D) $(CACHE)/go
	cd tests/keys/go/$(SERVER) && $(GO) build -trimpath -ldflags '-s -w' -o $@.new .
	mv $@.new $@

$(BENCH_BASE) $(BENCH_IMAGES_BASE): | .venv/installed
	rm -rf $@.new
	mkdir -p $@.new
	git archive $(@F:bench-%=%) csi_driver protos hatch_build.py | tar -x -C $@.new
	cd $@.new && $(CURDIR)/$(PY) hatch_build.py
	mv $@.new $@

$(KUBERNETES_BIN): | .venv/installed
	rm -rf $@.new
	mkdir -p $@.new
	cd tests/cluster/go/etcd && $(GO) build -trimpath -ldflags '-s -w' -o $@.new/etcd $$($(GO) list tool)
	cd tests/cluster/go/kubernetes && $(GO) build -trimpath -ldflags '$(KUBERNETES_LDFLAGS)' -o $@.new/ tool
	mv $@.new $@

$(CSI_ADDONS_BIN): | .venv/installed
	rm -rf $@.new
	mkdir -p $@.new
	cd tests/cluster/addons/csi-attacher && $(GO) build -trimpath -ldflags '-s -w' -o $@.new/ tool
	cd tests/cluster/addons/csi-addons && $(GO) build -trimpath -ldflags '-s -w' -o $@.new/ tool
	cd tests/cluster/addons/csi-addons && \
	    cp $$($(GO) list -m -f '{{.Dir}}' github.com/csi-addons/kubernetes-csi-addons)/deploy/controller/*.yaml $@.new/
	mv $@.new $@
