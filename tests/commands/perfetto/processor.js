// Runs Perfetto's trace processor (WebAssembly of its UI, written for a web worker) on one stream of requests.
// node processor.js FOLDER < requests > replies: FOLDER has engine_bundle.js and trace_processor*.wasm.
"use strict";
const fs = require("fs");
const path = require("path");
const vm = require("vm");

const folder = process.argv[2];
const told = (...words) => process.stderr.write(`${words.join(" ").slice(0, 1000)}\n`);
process.on("uncaughtException", (error) => {
  told(String(error.stack).slice(-1000)); // the source, one line of 150 KB, is before it
  process.exit(1);
});

class XMLHttpRequest {
  open(_method, name) {
    this.response = fs.readFileSync(path.join(folder, path.basename(name)));
  }
  send() {}
}

const worker = vm.createContext({
  XMLHttpRequest, TextDecoder, TextEncoder, URL, performance, crypto, setTimeout, setInterval, clearInterval,
  WorkerGlobalScope: class {}, location: { href: "https://localhost/" }, console: { log: told, warn: told, error: told },
});
worker.self = worker;
vm.runInContext(fs.readFileSync(path.join(folder, "engine_bundle.js"), "utf8"), worker);

const replies = [];
const port = { postMessage: (bytes) => replies.push(Buffer.from(bytes)) };
worker.onmessage({ data: port });
worker.requests = fs.readFileSync(0);
setTimeout(() => {
  port.onmessage({ data: vm.runInContext("Uint8Array.from(requests)", worker) });
  fs.writeSync(1, Buffer.concat(replies));
  process.exit(0);
}, 50);
