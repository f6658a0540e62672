/* The GPU kernels of logra for programs without Python: a C interface over embedded machine code for NVIDIA's
 * sm_80 (also 8.6 and 8.9), sm_90 and sm_100. The library needs the driver (libcuda.so.1) alone, which it
 * opens when it is first used; without one, every function returns LOGRA_CUDA_NO_DRIVER.
 *
 * All functions return a status; logra_cuda_last_error() says in a sentence what was wrong. Work is put on
 * `stream` of the current context, and nothing waits for it. Pointers to data are device pointers; strides
 * count elements; the last axis is contiguous. Rows, tokens and columns must each be fewer than 2^31. Results
 * do not depend on how rows, queries or examples are split into calls, but for covariance_update, where all
 * calls but the last should have a multiple of 2,048 rows.
 *
 * Temporary memory is the caller's: ask <op>_workspace for its size in bytes, and give at least that much,
 * aligned to 256 bytes, until the work is done. */
#ifndef LOGRA_CUDA_H
#define LOGRA_CUDA_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define LOGRA_CUDA_API
#else
#define LOGRA_CUDA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  LOGRA_CUDA_OK = 0,
  LOGRA_CUDA_NO_DRIVER = 1,       /* libcuda.so.1 is not there, or finds no GPU */
  LOGRA_CUDA_NO_CONTEXT = 2,      /* no context is current on the calling thread */
  LOGRA_CUDA_UNSUPPORTED_GPU = 3, /* of another generation than the embedded code */
  LOGRA_CUDA_INVALID_ARGUMENT = 4,
  LOGRA_CUDA_DRIVER_ERROR = 5 /* the driver refused a call */
} logra_cuda_status;

typedef enum { LOGRA_CUDA_FLOAT16 = 0, LOGRA_CUDA_BFLOAT16 = 1, LOGRA_CUDA_FLOAT32 = 2 } logra_cuda_dtype;

/* A CUstream or cudaStream_t; NULL is the default stream. */
typedef struct CUstream_st* logra_cuda_stream;

typedef struct {
  const void* data;
  logra_cuda_dtype dtype;
  int64_t rows, cols;
  int64_t row_stride;
} logra_cuda_matrix;

/* x or dy: [num_examples, num_tokens, dim]; packed: [num_tokens, dim], example_stride unused. */
typedef struct {
  const void* data;
  logra_cuda_dtype dtype;
  int64_t dim;
  int64_t example_stride, token_stride;
} logra_cuda_tokens;

typedef struct {
  int64_t num_examples;      /* N, or the number of segments if packed */
  int64_t num_tokens;        /* T of each example, or of all segments */
  const uint8_t* mask;       /* [N, T] or [T], 0 or 1, contiguous; NULL keeps all */
  const int64_t* cu_seqlens; /* [num_examples + 1], first to last token of each segment; NULL if not packed */
} logra_cuda_examples;

/* The k best and the k worst rows of each query, best (worst) first; each array [Q, k]. id -1: no row yet. */
typedef struct {
  float* top_scores;
  int64_t* top_ids;
  float* bottom_scores;
  int64_t* bottom_ids;
} logra_cuda_topk;

/* Whether this machine can run the kernels: driver, GPU, current context, generation. */
LOGRA_CUDA_API logra_cuda_status logra_cuda_available(void);
/* What the last call on this thread that did not return LOGRA_CUDA_OK had to say; valid until the next such
 * call. */
LOGRA_CUDA_API const char* logra_cuda_last_error(void);
/* The generations of the embedded code, e.g. "sm_80 sm_90 sm_100". */
LOGRA_CUDA_API const char* logra_cuda_architectures(void);

/* out[q * R + r] = <queries[q], rows[r]> * row_scale[r] + row_bias[r]; queries float32 [Q, D], rows [R, D] of
 * any dtype, row_scale and row_bias [R] or NULL. Products in float32 accuracy: float32 queries are split, not
 * rounded. */
LOGRA_CUDA_API size_t logra_cuda_scores_workspace(const logra_cuda_matrix* queries,
                                                  const logra_cuda_matrix* rows);
LOGRA_CUDA_API logra_cuda_status logra_cuda_scores(const logra_cuda_matrix* queries,
                                                   const logra_cuda_matrix* rows, const float* row_scale,
                                                   const float* row_bias, float* out, void* workspace,
                                                   size_t workspace_bytes, logra_cuda_stream stream);

/* Empties a state: all ids -1. */
LOGRA_CUDA_API logra_cuda_status logra_cuda_topk_reset(const logra_cuda_topk* state, int64_t num_queries,
                                                       int64_t k, logra_cuda_stream stream);
/* Merges the rows' scores into `state`; row r has the id row_offset + r. 1 <= k <= 128. Order: score, then
 * lower id; NaN is never taken. */
LOGRA_CUDA_API size_t logra_cuda_topk_scores_workspace(const logra_cuda_matrix* queries,
                                                       const logra_cuda_matrix* rows, int64_t k);
LOGRA_CUDA_API logra_cuda_status logra_cuda_topk_scores(const logra_cuda_matrix* queries,
                                                        const logra_cuda_matrix* rows, int64_t k,
                                                        const float* row_scale, const float* row_bias,
                                                        int64_t row_offset, const logra_cuda_topk* state,
                                                        void* workspace, size_t workspace_bytes,
                                                        logra_cuda_stream stream);

/* out[r] = ||factor rows[r]||^2; rows [R, K], factor float32 [M, K]. */
LOGRA_CUDA_API size_t logra_cuda_self_influence_workspace(const logra_cuda_matrix* rows,
                                                          const logra_cuda_matrix* factor);
LOGRA_CUDA_API logra_cuda_status logra_cuda_self_influence(const logra_cuda_matrix* rows,
                                                           const logra_cuda_matrix* factor, float* out,
                                                           void* workspace, size_t workspace_bytes,
                                                           logra_cuda_stream stream);

/* out[n] = sum_t m_t (P_o dy_t) (P_i x_t)^T, [num_examples, Ko, Ki] float32, contiguous (LoGra, Eq. 6).
 * proj_in [Ki, I] or NULL where x is projected already; proj_out [Ko, O] likewise. A projection has its
 * tokens' dtype. x and dy have one dtype, or x is float32 and projected already. For ranks above 128 on a
 * projected side, project first (logra_cuda_project): the fused kernel would project the same tokens once for
 * each tile of the result. */
LOGRA_CUDA_API size_t logra_cuda_projected_gradients_workspace(const logra_cuda_examples* examples,
                                                               const logra_cuda_tokens* x,
                                                               const logra_cuda_tokens* dy,
                                                               const logra_cuda_matrix* proj_in,
                                                               const logra_cuda_matrix* proj_out);
LOGRA_CUDA_API logra_cuda_status logra_cuda_projected_gradients(
    const logra_cuda_examples* examples, const logra_cuda_tokens* x, const logra_cuda_tokens* dy,
    const logra_cuda_matrix* proj_in, const logra_cuda_matrix* proj_out, float* out, void* workspace,
    size_t workspace_bytes, logra_cuda_stream stream);

/* Some elements of these gradients, each scaled: out [num_examples, count] float32, contiguous. `positions`
 * [Ko, Ki] int32, contiguous, has the place of an element in its row of out, 0 to count - 1, each for one
 * element, or -1 where no row holds it; tiles of the gradient without any are not computed. scale [count]
 * float32; NULL: ones. The rest as in projected_gradients. */
LOGRA_CUDA_API size_t logra_cuda_projected_coordinates_workspace(
    const logra_cuda_examples* examples, const logra_cuda_tokens* x, const logra_cuda_tokens* dy,
    const logra_cuda_matrix* proj_in, const logra_cuda_matrix* proj_out, int64_t count);
LOGRA_CUDA_API logra_cuda_status logra_cuda_projected_coordinates(
    const logra_cuda_examples* examples, const logra_cuda_tokens* x, const logra_cuda_tokens* dy,
    const logra_cuda_matrix* proj_in, const logra_cuda_matrix* proj_out, int64_t count,
    const int32_t* positions, const float* scale, float* out, void* workspace, size_t workspace_bytes,
    logra_cuda_stream stream);

/* out[t * K + k] = <x[t], proj[k]>, float32; x and proj of one dtype. */
LOGRA_CUDA_API logra_cuda_status logra_cuda_project(const logra_cuda_matrix* x, const logra_cuda_matrix* proj,
                                                    float* out, logra_cuda_stream stream);

/* cov[i * cov_stride + j] += sum_r rows[r, i] rows[r, j] for j <= i; the strict upper triangle is left as it
 * is. */
LOGRA_CUDA_API logra_cuda_status logra_cuda_covariance_update(float* cov, int64_t cov_stride,
                                                              const logra_cuda_matrix* rows,
                                                              logra_cuda_stream stream);

/* Rows float32 [R, D] to packed float16 [R, D], contiguous, and a power of two per row, row_scale [R];
 * exponents [D] is each column's module exponent, -126 to 127. unpack_rows is the way back. */
LOGRA_CUDA_API logra_cuda_status logra_cuda_pack_rows(const logra_cuda_matrix* rows, const int32_t* exponents,
                                                      uint16_t* packed, float* row_scale,
                                                      logra_cuda_stream stream);
LOGRA_CUDA_API logra_cuda_status logra_cuda_unpack_rows(const logra_cuda_matrix* packed,
                                                        const float* row_scale, const int32_t* exponents,
                                                        float* out, logra_cuda_stream stream);

#ifdef __cplusplus
}
#endif
#endif
