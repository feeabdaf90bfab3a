// A Vault in memory for the tests of luks-csi: unsealed, its root token printed. `vault ADDRESS [CERT KEY]`.
//
// The server's own command needs modules that no proxy serves in the versions it asks for; the core does not.
package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"

	"github.com/hashicorp/go-hclog"
	kubeauth "github.com/hashicorp/vault-plugin-auth-kubernetes"
	kv "github.com/hashicorp/vault-plugin-secrets-kv"
	"github.com/hashicorp/vault/builtin/logical/transit"
	vaulthttp "github.com/hashicorp/vault/http"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/physical/inmem"
	"github.com/hashicorp/vault/vault"
)

var plugins = map[consts.PluginType]map[string]logical.Factory{
	consts.PluginTypeSecrets:    {"kv": kv.Factory, "transit": transit.Factory},
	consts.PluginTypeCredential: {"kubernetes": kubeauth.Factory},
}

// registry answers what the core asks about the plugins that are compiled in.
type registry struct{}

func (registry) Contains(name string, kind consts.PluginType) bool {
	_, found := plugins[kind][name]
	return found
}

func (registry) Get(name string, kind consts.PluginType) (func() (interface{}, error), bool) {
	_, found := plugins[kind][name]
	return func() (interface{}, error) { return nil, nil }, found
}

func (registry) Keys(kind consts.PluginType) []string {
	names := []string{}
	for name := range plugins[kind] {
		names = append(names, name)
	}
	return names
}

func (r registry) DeprecationStatus(name string, kind consts.PluginType) (consts.DeprecationStatus, bool) {
	return consts.Supported, r.Contains(name, kind)
}

func (registry) IsBuiltinEntPlugin(string, consts.PluginType) bool { return false }

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func main() {
	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.Error})
	storage, err := inmem.NewInmem(nil, logger)
	must(err)
	core, err := vault.NewCore(&vault.CoreConfig{
		Physical:           storage,
		Logger:             logger,
		DisableMlock:       true,
		BuiltinRegistry:    registry{},
		LogicalBackends:    plugins[consts.PluginTypeSecrets],
		CredentialBackends: plugins[consts.PluginTypeCredential],
	})
	must(err)
	made, err := core.Initialize(context.Background(), &vault.InitParams{
		BarrierConfig: &vault.SealConfig{SecretShares: 1, SecretThreshold: 1},
	})
	must(err)
	for _, share := range made.SecretShares {
		_, err = core.Unseal(share)
		must(err)
	}
	listener, err := net.Listen("tcp", os.Args[1])
	must(err)
	handler := vaulthttp.Handler.Handler(&vault.HandlerProperties{Core: core})
	fmt.Printf("%s %s\n", listener.Addr(), made.RootToken)
	if len(os.Args) > 3 {
		must(http.ServeTLS(listener, handler, os.Args[2], os.Args[3]))
	}
	must(http.Serve(listener, handler))
}
