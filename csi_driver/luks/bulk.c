/* The compiled half of bulk.py: dm-crypt's AES modes over whole chunks, for every key size alike.

   Mostly, libcrypto only does AES in ECB, over kilobytes at a time; tweaks, chaining and IVs are done here, over many
   sectors at once. A call of libcrypto's own XTS for each sector of 512 bytes is slower, it has no AES-192-XTS, and its
   CBC encrypts one block after the other where the blocks of different sectors do not depend on each other. For larger
   sectors its own XTS is faster, and is used.

   Nothing of OpenSSL is needed to build this: the library is looked up when it runs. A call keeps no state, so that
   threads may make calls at the same time, and wipes what it derived from the key. */

#define _DEFAULT_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "IVs and tweaks are little-endian numbers, and are handled as the machine's own"
#endif

#ifndef BULK_DIGEST
#define BULK_DIGEST ""
#endif

/* Of this source, put in by the build: bulk.py uses no library that was made of another one. */
const char bulk_digest[] = BULK_DIGEST;

enum {
    SECTOR = 512,      /* IVs count these, whatever the sector size */
    BLOCKS = 512,      /* of 16 bytes: the 8 KiB that are worked on at a time, half of a first-level cache at least */
    CHAINS = 64,       /* sectors whose CBC chains are encrypted side by side */
    COLUMN = 4,        /* blocks that are taken from each of them in turn: a cache line */
    BLOCK = 16,
    LARGE = 2048,      /* bytes of a sector from which on libcrypto's own XTS is faster */
};

/* Of a buffer of any alignment and of any use. */
typedef uint64_t block __attribute__((vector_size(BLOCK), aligned(1), may_alias));
typedef int32_t words __attribute__((vector_size(BLOCK)));

/* What bulk.py fills in, in this order (_Parameters). */
struct parameters {
    uint8_t key[64];       /* the data key; behind it the key that encrypts the IVs */
    uint32_t key_size;     /* bytes */
    uint32_t iv_key_size;  /* bytes; 0: the number of a sector is its IV as it is */
    uint32_t sector_size;  /* bytes, a multiple of SECTOR */
    uint32_t xts;          /* else CBC */
    uint32_t narrow;       /* the number of a sector has 32 bits, else 64 */
};

/* <openssl/evp.h> of OpenSSL 3. */
typedef struct evp_cipher_st EVP_CIPHER;
typedef struct evp_cipher_ctx_st EVP_CIPHER_CTX;

static struct {
    EVP_CIPHER *(*fetch)(void *library, const char *algorithm, const char *properties);
    void (*free)(EVP_CIPHER *);
    EVP_CIPHER_CTX *(*context_new)(void);
    void (*context_free)(EVP_CIPHER_CTX *);
    int (*set_padding)(EVP_CIPHER_CTX *, int padding);
    int (*init)(EVP_CIPHER_CTX *, const EVP_CIPHER *, const uint8_t *key, const uint8_t *iv, int encrypt, const void *);
    int (*update)(EVP_CIPHER_CTX *, uint8_t *out, int *written, const uint8_t *in, int length);
} evp;

static const struct {
    const char *name;
    void *pointer;
} SYMBOLS[] = {
    {"EVP_CIPHER_fetch", &evp.fetch},
    {"EVP_CIPHER_free", &evp.free},
    {"EVP_CIPHER_CTX_new", &evp.context_new},
    {"EVP_CIPHER_CTX_free", &evp.context_free},
    {"EVP_CIPHER_CTX_set_padding", &evp.set_padding},
    {"EVP_CipherInit_ex2", &evp.init},
    {"EVP_CipherUpdate", &evp.update},
};

/* Look up libcrypto, for good. Returns NULL, or what is wrong. */
const char *bulk_load(const char *library) {
    void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL)
        return dlerror();
    for (size_t i = 0; i < sizeof SYMBOLS / sizeof *SYMBOLS; i++) {
        void *found = dlsym(handle, SYMBOLS[i].name);
        if (found == NULL)
            return dlerror();
        memcpy(SYMBOLS[i].pointer, &found, sizeof found);
    }
    return NULL;
}

struct work {
    EVP_CIPHER_CTX *data;
    EVP_CIPHER_CTX *ivs; /* or NULL */
    block iv[CHAINS];
    block area[BLOCKS];
};

static EVP_CIPHER_CTX *context_new(const char *name, const uint8_t *key, int encrypt) {
    EVP_CIPHER *cipher = evp.fetch(NULL, name, NULL);
    EVP_CIPHER_CTX *context = evp.context_new();
    if (cipher == NULL || context == NULL || evp.init(context, cipher, key, NULL, encrypt, NULL) != 1 ||
        evp.set_padding(context, 0) != 1) {
        evp.context_free(context);
        context = NULL;
    }
    evp.free(cipher);
    return context;
}

static EVP_CIPHER_CTX *ecb_new(const uint8_t *key, uint32_t key_size, int encrypt) {
    return context_new(key_size == 16 ? "AES-128-ECB" : key_size == 24 ? "AES-192-ECB" : "AES-256-ECB", key, encrypt);
}

/* What the context does, to whole blocks; `in` and `out` may be the same. Returns 0, or -1. */
static int update(EVP_CIPHER_CTX *context, const block *in, block *out, size_t blocks) {
    int written = 0, length = (int)(blocks * BLOCK);
    if (evp.update(context, (uint8_t *)out, &written, (const uint8_t *)in, length) != 1)
        return -1;
    return written == length ? 0 : -1;
}

static int make_ivs(struct work *work, const struct parameters *given, uint64_t first, size_t sectors) {
    for (size_t i = 0; i < sectors; i++) {
        uint64_t number = first + i * (given->sector_size / SECTOR);
        work->iv[i] = (block){given->narrow ? (uint32_t)number : number, 0};
    }
    return work->ivs ? update(work->ivs, work->iv, work->iv, sectors) : 0;
}

/* The tweak of the next block: times x, in IEEE 1619's field of 2^128 elements. The top bits of both halves move to the
   bottom of the other half, that of the upper one as x^7 + x^2 + x + 1. */
static inline block doubled(block tweak) {
    words tops = __builtin_shufflevector((words)tweak, (words)tweak, 3, 0, 1, 0);
    return (tweak + tweak) ^ (block)((tops >> 31) & (words){0x87, 0, 1, 0});
}

static int xts(struct work *work, const struct parameters *given, const block *in, block *out, size_t sectors) {
    size_t each = given->sector_size / BLOCK, all = sectors * each, i = 0;
    for (size_t sector = 0; sector < sectors; sector++) {
        block tweak = work->iv[sector];
        for (size_t end = i + each; i < end; i++) {
            work->area[i] = tweak;
            out[i] = in[i] ^ tweak;
            tweak = doubled(tweak);
        }
    }
    if (update(work->data, out, out, all))
        return -1;
    for (i = 0; i < all; i++)
        out[i] ^= work->area[i];
    return 0;
}

static int xts_large(struct work *work, const struct parameters *given, const block *in, block *out, size_t sectors) {
    size_t each = given->sector_size / BLOCK;
    for (size_t sector = 0; sector < sectors; sector++, in += each, out += each)
        if (evp.init(work->data, NULL, NULL, (const uint8_t *)&work->iv[sector], -1, NULL) != 1 ||
            update(work->data, in, out, each))
            return -1;
    return 0;
}

static int cbc_decrypt(struct work *work, const struct parameters *given, const block *in, block *out, size_t sectors) {
    size_t each = given->sector_size / BLOCK, all = sectors * each;
    memcpy(work->area, in, all * BLOCK); /* `out` may be `in` */
    if (update(work->data, work->area, out, all))
        return -1;
    for (size_t sector = 0, i = 0; sector < sectors; sector++) {
        block before = work->iv[sector];
        for (size_t end = i + each; i < end; i++) {
            out[i] ^= before;
            before = work->area[i];
        }
    }
    return 0;
}

static int cbc_encrypt(struct work *work, const struct parameters *given, const block *in, block *out, size_t sectors) {
    size_t each = given->sector_size / BLOCK;
    for (size_t column = 0; column < each; column += COLUMN) {
        for (size_t i = 0; i < sectors; i++)
            for (size_t row = 0; row < COLUMN; row++)
                work->area[row * sectors + i] = in[i * each + column + row];
        for (size_t row = 0; row < COLUMN; row++) {
            block *line = work->area + row * sectors;
            for (size_t i = 0; i < sectors; i++)
                line[i] ^= work->iv[i];
            if (update(work->data, line, line, sectors))
                return -1;
            memcpy(work->iv, line, sectors * BLOCK);
        }
        for (size_t i = 0; i < sectors; i++)
            for (size_t row = 0; row < COLUMN; row++)
                out[i * each + column + row] = work->area[row * sectors + i];
    }
    return 0;
}

/* En- or decrypt `sectors` sectors from `in` to `out`, which may be `in` but not overlap it in part; `first` is the
   number of the first one in units of 512 bytes. Returns 0, or -1 when libcrypto refuses: then `out` holds anything. */
int bulk_crypt(
    const struct parameters *given, int encrypt, uint64_t first, const uint8_t *in, uint8_t *out, size_t sectors
) {
    int large = given->xts && given->sector_size >= LARGE && given->key_size != 24;
    int (*mode)(struct work *, const struct parameters *, const block *, block *, size_t) =
        large ? xts_large : given->xts ? xts : encrypt ? cbc_encrypt : cbc_decrypt;
    size_t most = mode == cbc_encrypt || large ? CHAINS : BLOCKS * BLOCK / given->sector_size;
    struct work work = {
        .data = large ? context_new(given->key_size == 16 ? "AES-128-XTS" : "AES-256-XTS", given->key, encrypt)
                      : ecb_new(given->key, given->key_size, encrypt),
    };
    int failed = work.data == NULL;
    if (given->iv_key_size && !large) { /* its own XTS encrypts the IVs by itself */
        work.ivs = ecb_new(given->key + given->key_size, given->iv_key_size, 1);
        failed |= work.ivs == NULL;
    }
    while (sectors && !failed) {
        size_t some = sectors < most ? sectors : most, bytes = some * given->sector_size;
        failed = make_ivs(&work, given, first, some) || mode(&work, given, (const block *)in, (block *)out, some);
        first += bytes / SECTOR, in += bytes, out += bytes, sectors -= some;
    }
    evp.context_free(work.data); /* wipes the key in it */
    evp.context_free(work.ivs);
    explicit_bzero(&work, sizeof work);
    return failed ? -1 : 0;
}
