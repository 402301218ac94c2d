// SPDX-License-Identifier: Apache-2.0
#pragma once

/// @file
/// The version of gdn. CMake reads it from here, so that users who only add include paths have it, too.

#define GDN_VERSION_MAJOR 0
#define GDN_VERSION_MINOR 1
#define GDN_VERSION_PATCH 0
