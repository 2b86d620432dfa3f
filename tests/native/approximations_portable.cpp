#include "../../csrc/cpu/tables.h"
#include "../../csrc/cpu/vec_portable.h"
#include "../../csrc/cpu/kernels.h"
#include "approximations.h"
#include "approximations_of.h"

const Approximations kPortableApproximations = approximations_of<l2l::Portable<float>>("portable");
