"""data/kernels.c under the compiler's sanitizers: no byte outside of an array is read or written, nothing is undefined.

A small C program calls every function that Python calls, on arrays that are exactly as long as they must be."""
import os, shutil, subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parent.parent / "data" / "kernels.c"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]

DRIVER = r"""
static void *kept[100000];                            /* what is not kept and not freed is a leak, and reported */
static int count, failed;

static void *new_bytes(int64_t size) {
    uint8_t *p = kept[count++] = malloc(size);
    for (int64_t i = 0; i < size; i++) p[i] = rand() >> 7;
    return p;
}

static float *new_floats(int64_t n) {
    float *x = new_bytes(n * sizeof(float));
    for (int64_t i = 0; i < n; i++) x[i] = rand() % 2001 / 1000.f - 1;
    return x;
}

static const struct layer *layer(int64_t n, int64_t k, int64_t bits, int64_t group, const struct layer *first) {
    const void *weights = bits == 32 ? new_floats(n * k) : new_bytes(n * k * bits / 8);
    int64_t scales = bits == 32 ? 0 : n * (k / group);
    uint16_t *halves = new_bytes(2 * scales);
    for (int64_t i = 0; i < scales; i++) halves[i] = 0x1c00 + rand() % 1024;                   /* about 2^-8 */
    struct layer *l = new_bytes(sizeof *l);
    *l = (struct layer){weights, halves, n % 2 ? new_floats(n) : NULL, n, k, group, bits, first};
    return l;
}

static void products(int64_t n, int64_t k, int64_t bits, int64_t group) {
    const struct layer *l = layer(n, k, bits, group, NULL);
    for (int64_t m = 0; m < 14; m += m < 2 ? 1 : 3) failed |= linear(l, new_floats(m * k), m, new_floats(m * n));
    int64_t ids[] = {0, n - 1, n};
    failed |= gather(l, ids, 2, new_floats(2 * k)) | !gather(l, ids, 3, new_floats(3 * k));
}

static void between(int64_t m, int64_t n) {
    rms_norm(new_floats(m * n), new_floats(n), 1e-5f, m, n, new_floats(m * n));
    rms_norm_backward(new_floats(m * n), new_floats(n), 1e-5f, m, n, new_floats(m * n), new_floats(m * n), new_floats(PARTS * n));
    swiglu(new_floats(m * n), new_floats(m * n), m * n, new_floats(m * n));
    swiglu_backward(new_floats(m * n), new_floats(m * n), m * n, new_floats(m * n), new_floats(m * n), new_floats(m * n));
    int64_t *targets = new_bytes(m * sizeof(int64_t));
    for (int64_t r = 0; r < m; r++) targets[r] = r % 5 == 3 ? IGNORE : r % n;
    failed |= cross_entropy(new_floats(m * n), targets, m, n, new_floats(m));
    targets[m - 1] = n;
    failed |= !cross_entropy(new_floats(m * n), targets, m, n, new_floats(m));
}

static void heads(int64_t B, int64_t T, int64_t H, int64_t D, int64_t R, int64_t rotary_B, int norm) {
    struct head_strides s = {{B, T, H, D, R, rotary_B}, H * T * D, T * D, D};
    int64_t size = B * T * H * D, angles = rotary_B * T * R;
    const float *weight = norm ? new_floats(D) : NULL;
    to_heads(new_floats(size), weight, 1e-6f, new_floats(angles), new_floats(angles), &s.sizes, new_floats(size));
    to_heads_backward(new_floats(size), weight, 1e-6f, new_floats(angles), new_floats(angles), &s, new_floats(size), new_floats(size),
                      new_floats(PARTS * D));
}

/* The new positions are the last for which the cache has room. */
static void decode_last(int64_t bits, int64_t rank, int64_t window, struct model s) {
    struct block blocks[2];
    for (int i = 0; i < 2; i++) {
        #define LAYER(n, k) layer(n, rank ? rank : k, bits, bits == 4 ? 32 : rank ? rank : k, \
                                  rank ? layer(rank, k, bits, bits == 4 ? 32 : k, NULL) : NULL)
        int64_t cache = s.batch * s.K * s.capacity * s.D;
        blocks[i] = (struct block){
            new_floats(s.C), window ? new_floats(s.D) : NULL, window ? new_floats(s.D) : NULL, new_floats(s.C),
            LAYER(s.H * s.D, s.C), LAYER(s.K * s.D, s.C), LAYER(s.K * s.D, s.C), LAYER(s.C, s.H * s.D),
            LAYER(s.I, s.C), LAYER(s.I, s.C), LAYER(s.C, s.I), new_floats(cache), new_floats(cache), window};
    }
    #define TABLE layer(7, s.C, bits, bits == 4 ? 32 : s.C, NULL)
    s.blocks = blocks, s.count = 2, s.start = s.capacity - s.T;
    s.embedding = TABLE, s.head = TABLE, s.norm = new_floats(s.C), s.frequencies = new_floats(s.R);
    int64_t *ids = new_bytes(s.batch * s.T * sizeof(int64_t));
    for (s.last = 1; s.last <= s.T; s.last++) for (int wrong = 0; wrong < 2; wrong++) {
        for (int64_t i = 0; i < s.batch * s.T; i++) ids[i] = i % 7;
        ids[s.batch * s.T - 1] += wrong * 7;
        failed |= decode(&s, 1, 1e-5f, ids, new_floats(s.batch * s.last * 7)) != 2 * wrong;
    }
}

int main(void) {
    products(1, 1, 8, 1), products(5, 31, 8, 31), products(17, 32, 8, 32), products(70, 416, 8, 416);
    products(3, 32, 4, 32), products(19, 288, 4, 32), products(7, 192, 4, 64), products(70, 384, 4, 128);
    products(1, 1, 32, 1), products(6, 31, 32, 31), products(70, 416, 32, 416);
    between(1, 1), between(3, 7), between(5, 8), between(10, 63), between(101, 1001);
    heads(1, 1, 1, 1, 0, 1, 1), heads(2, 3, 2, 7, 2, 1, 1), heads(2, 5, 3, 22, 11, 2, 0), heads(3, 64, 9, 64, 32, 1, 1);
    for (int64_t batch = 1; batch < 4; batch += 2) for (int64_t T = 1; T < 3; T++) {
        struct model odd = {.T = T, .batch = batch, .capacity = 3, .C = 52, .H = 4, .K = 2, .D = 6, .I = 70, .R = 3, .widest = 96};
        struct model even = {.T = T, .batch = batch, .capacity = 21, .C = 64, .H = 4, .K = 1, .D = 24, .I = 160, .R = 8, .widest = 160};
        decode_last(32, 0, 5, odd), decode_last(32, 3, 0, odd);
        decode_last(4, 0, 0, even), decode_last(8, 0, 0, even), decode_last(32, 0, 0, even);
        decode_last(4, 32, 4, even), decode_last(8, 32, 4, even), decode_last(32, 32, 4, even);
    }
    return failed;                                    /* a status that a function should not have returned */
}
"""


@pytest.mark.parametrize("flags", [["-march=native", "-fopenmp"], [], ["-march=native", "-DLANES=16", "-DBYTES=1"]],
                         ids=["native", "portable", "wide"])
def test_no_report(flags, tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.name != "posix" or compiler is None:
        pytest.skip("no C compiler")

    def run(source, *more):
        (tmp_path / "driver.c").write_text(source, encoding="utf-8")
        command = [compiler, *SANITIZE, *flags, *more, tmp_path / "driver.c", "-o", tmp_path / "driver", "-lm"]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            return built.returncode, built.stderr
        ran = subprocess.run([tmp_path / "driver"], capture_output=True, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "passive"})
        return ran.returncode, ran.stdout + ran.stderr

    if run("int main(void) { return 0; }")[0]:
        pytest.skip(f"{compiler} cannot sanitize here")
    assert run(DRIVER, "-include", KERNELS) == (0, "")
