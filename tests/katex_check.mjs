// Every formula of a document parses in KaTeX, the renderer of GitLab (GitHub's MathJax accepts what KaTeX does).
//
//     mkdir scratch && npm install --prefix scratch katex
//     NODE_PATH=scratch/node_modules node tests/katex_check.mjs theory.md README.md
//
// A formula is a fenced block that opens with ```math, or inline $`...`$. What KaTeX refuses is printed with its line,
// and the exit status is 1. Macros that GitHub switches off are refused too. Not part of CI: it needs node and npm.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";

const require = createRequire(import.meta.url);
const katex = require("katex"); // by require, because import knows nothing of NODE_PATH
const REFUSED_BY_GITHUB = /\\(operatorname|def|newcommand|renewcommand|require|href|includegraphics)\b/;

let formulas = 0;
let bad = 0;
function check(file, line, tex, displayMode) {
  formulas += 1;
  try {
    if (REFUSED_BY_GITHUB.test(tex)) throw new Error("uses a macro that GitHub does not allow");
    katex.renderToString(tex, { displayMode, throwOnError: true, strict: "error" });
  } catch (error) {
    bad += 1;
    console.log(`${file}:${line}: ${error.message}\n    ${tex.trim()}`);
  }
}

const files = process.argv.slice(2);
if (!files.length) throw new Error("give the documents to check, for instance theory.md");
for (const file of files) {
  let block = null; // lines of the fenced block that we are in
  let language = "";
  let start = 0;
  readFileSync(file, "utf8").split("\n").forEach((text, index) => {
    const fence = text.match(/^\s*```(\S*)/);
    if (fence && block === null) {
      [block, language, start] = [[], fence[1], index + 1];
    } else if (fence) {
      if (language === "math") check(file, start, block.join("\n"), true);
      block = null;
    } else if (block !== null) {
      block.push(text);
    } else {
      for (const match of text.matchAll(/\$`([^`]*)`\$/g)) check(file, index + 1, match[1], false);
      const rest = text.replace(/\$`[^`]*`\$/g, "").replace(/`[^`]*`/g, "");
      if (rest.includes("$")) {
        bad += 1;
        console.log(`${file}:${index + 1}: a $ that belongs to no formula: ${rest.trim().slice(0, 80)}`);
      }
    }
  });
  if (block !== null) {
    bad += 1;
    console.log(`${file}:${start}: a fenced block that is never closed`);
  }
}
console.log(`${formulas} formulas, ${bad} refused`);
process.exit(bad ? 1 : 0);
