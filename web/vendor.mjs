// After `npm ci`: the few files of onnxruntime-web that the page loads, packed, beside the page.
//
// Not every static host compresses, so the page unpacks them itself (see unzip in networks.js): 3.7
// instead of 14 MB. Nothing else of node_modules/ is needed to serve the page.

import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { gzipSync } from "node:zlib";

const SOURCE = new URL("node_modules/onnxruntime-web/dist/", import.meta.url);
const TARGET = new URL("runtime/", import.meta.url);
const SCRIPTS = ["ort.wasm.bundle.min.mjs", "ort.webgpu.bundle.min.mjs"];
const BINARIES = ["ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.asyncify.wasm"];

mkdirSync(TARGET, { recursive: true });
for (const name of SCRIPTS) copyFileSync(new URL(name, SOURCE), new URL(name, TARGET));
for (const name of BINARIES) {
  const packed = gzipSync(readFileSync(new URL(name, SOURCE)), { level: 9 });
  writeFileSync(new URL(`${name}.gz`, TARGET), packed);
  console.log(`runtime/${name}.gz: ${(packed.length / 1e6).toFixed(1)} MB`);
}
