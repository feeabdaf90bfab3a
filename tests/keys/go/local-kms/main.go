// AWS KMS as local-kms has it, for the tests of luks-csi: `local-kms HOST:PORT FOLDER REGION`.
//
// The server's own command listens on every address of the machine.
package main

import (
	"fmt"
	"net/http"
	"os"

	"github.com/nsmithuk/local-kms/src"
	"github.com/nsmithuk/local-kms/src/config"
	"github.com/nsmithuk/local-kms/src/data"
)

func main() {
	config.AWSAccountId, config.AWSRegion = "111122223333", os.Args[3]
	database := data.NewDatabase(os.Args[2])
	defer database.Close()
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { src.HandleRequest(w, r, database) })
	fmt.Fprintln(os.Stderr, http.ListenAndServe(os.Args[1], nil))
	os.Exit(1)
}
