#pragma once

/// All of Quantal for libtorch programs.
#include <quantal/calibration.h>
#include <quantal/checkpoint.h>
#include <quantal/model.h>
#include <quantal/qtensor.h>
#include <quantal/qtype.h>
#include <quantal/quantize.h>
#include <quantal/quantizer.h>
#include <quantal/report.h>
