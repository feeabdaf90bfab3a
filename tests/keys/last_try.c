// A PKCS#11 module that is SoftHSM's, but for this: its tokens say that one more wrong PIN locks them, and who logs in
// all the same finds them locked.

#include <dlfcn.h>
#include <string.h>

#define GET_TOKEN_INFO 6
#define LOGIN 18
#define FUNCTIONS 68
#define FLAGS 96
#define USER_PIN_FINAL_TRY 0x20000UL
#define PIN_LOCKED 0xA4UL

typedef unsigned long (*function)();

static struct {
    unsigned char version[sizeof(void *)];
    function functions[FUNCTIONS];
} list;
static function get_token_info;

static unsigned long told(unsigned long slot, char *info) {
    unsigned long flags, code = get_token_info(slot, info);
    memcpy(&flags, info + FLAGS, sizeof flags);
    flags |= USER_PIN_FINAL_TRY;
    memcpy(info + FLAGS, &flags, sizeof flags);
    return code;
}

static unsigned long locked() { return PIN_LOCKED; }

unsigned long C_GetFunctionList(void **found) {
    void *theirs;
    unsigned long code = ((function)dlsym(dlopen(SOFTHSM, RTLD_NOW), "C_GetFunctionList"))(&theirs);
    memcpy(&list, theirs, sizeof list);
    get_token_info = list.functions[GET_TOKEN_INFO];
    list.functions[GET_TOKEN_INFO] = (function)told;
    list.functions[LOGIN] = (function)locked;
    *found = &list;
    return code;
}
