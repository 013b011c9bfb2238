// TensorRT's headers name two types of the CUDA runtime and need nothing else of it. Used where CUDA is not installed.
#pragma once
typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
