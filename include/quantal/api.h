#pragma once

/// Marks what a Quantal library exports; everything else is hidden (-fvisibility=hidden).
#define QUANTAL_API __attribute__((visibility("default")))
