/* What a C program sees of the library on this machine: the status, and why. */
#include <stdio.h>

#include "logra/cuda.h"

int main(void) {
  const logra_cuda_status status = logra_cuda_available();
  printf("%d %s\n", (int)status, status == LOGRA_CUDA_OK ? "" : logra_cuda_last_error());
  logra_cuda_matrix none = {NULL, LOGRA_CUDA_FLOAT16, 0, 16, 16};
  logra_cuda_matrix queries = {NULL, LOGRA_CUDA_FLOAT32, 0, 16, 16};
  /* nothing to do needs no GPU */
  printf("%d\n", (int)logra_cuda_scores(&queries, &none, NULL, NULL, NULL, NULL, 0, NULL));
  return 0;
}
