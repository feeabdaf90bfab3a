"""VM images: imported once, cloned plain, encrypted, decrypted or reencrypted, and given to volumes."""
