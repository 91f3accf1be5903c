"""ptxemu: functional emulator for compiled PTX on the CPU.  See README.md."""
from __future__ import annotations
import ctypes as C, hashlib, json, os, re, struct, subprocess, sys, tempfile
import numpy as np

_HERE = os.path.dirname(os.path.abspath(__file__))
_SRC = ["core.h", "exec.h", "alu.h", "warpops.h", "parse.h", "decode.h", "compile.h", "ptxemu.cpp"]
_lib = None


class PtxEmuError(RuntimeError):
    kind = "error"
    stats = None


class OutOfBounds(PtxEmuError): pass
class Misaligned(PtxEmuError): pass
class UninitRead(PtxEmuError): pass
class RaceError(PtxEmuError): pass
class Unsupported(PtxEmuError): pass
class Deadlock(PtxEmuError): pass
class DeviceAssert(PtxEmuError): pass


_KINDS = {"oob": OutOfBounds, "shared_oob": OutOfBounds, "local_oob": OutOfBounds, "param_oob": OutOfBounds, "readonly": OutOfBounds,
          "misaligned": Misaligned, "uninit_shared": UninitRead, "uninit_local": UninitRead, "uninit_global": UninitRead,
          "unsupported": Unsupported, "deadlock": Deadlock, "divergent_barrier": Deadlock, "barrier": Deadlock,
          "instruction_limit": Deadlock, "membermask": Deadlock, "device_assert": DeviceAssert}


def obstacle():
    """Why the emulator cannot be built here, or None."""
    import platform, shutil
    if shutil.which("g++") is None: return "no g++ on this machine"
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"): return "the PTX emulator runs on x86-64 Linux only"
    with open("/proc/cpuinfo") as file:
        if " avx2 " not in file.read(): return "the PTX emulator needs AVX2, which this CPU does not have"
    return None


def _build():
    h = hashlib.sha256()
    for f in _SRC:
        h.update(open(os.path.join(_HERE, f), "rb").read())
    flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing",
             "-shared", "-fPIC", "-w"]
    h.update(" ".join(flags).encode())
    try:
        m = [l for l in open("/proc/cpuinfo") if l.startswith(("model name", "flags"))][:2]
        h.update("".join(m).encode())
    except OSError:
        pass
    base = os.environ.get("PTXEMU_CACHE") or os.path.expanduser("~/.cache/ptxemu")
    try:
        os.makedirs(base, exist_ok=True)
        if not os.access(base, os.W_OK): raise OSError
    except OSError:
        base = os.path.join(tempfile.gettempdir(), "ptxemu-cache-%d" % os.getuid()); os.makedirs(base, exist_ok=True)
    so = os.path.join(base, "ptxemu-%s.so" % h.hexdigest()[:20])
    if not os.path.exists(so):
        tmp = so + ".%d.tmp" % os.getpid()
        r = subprocess.run(["g++", *flags, os.path.join(_HERE, "ptxemu.cpp"), "-o", tmp], capture_output=True, text=True)
        if r.returncode: raise RuntimeError("ptxemu core failed to build:\n" + r.stderr[-4000:])
        os.replace(tmp, so)
    return so


class _CRegion(C.Structure):
    _fields_ = [("va", C.c_uint64), ("size", C.c_uint64), ("host", C.c_void_p), ("name", C.c_char_p), ("niv", C.c_uint64),
                ("iv", C.POINTER(C.c_uint64)), ("flags", C.c_uint64)]


def _load():
    global _lib
    if _lib is None:
        L = C.CDLL(_build())
        L.pe_create.restype = C.c_void_p; L.pe_create.argtypes = [C.c_char_p, C.POINTER(C.c_void_p)]
        L.pe_destroy.argtypes = [C.c_void_p]; L.pe_free.argtypes = [C.c_void_p]
        L.pe_info.restype = C.c_void_p; L.pe_info.argtypes = [C.c_void_p]
        L.pe_global_host.restype = C.c_void_p; L.pe_global_host.argtypes = [C.c_void_p, C.c_uint64]
        L.pe_launch.restype = C.c_void_p
        L.pe_launch.argtypes = [C.c_void_p, C.c_char_p, C.POINTER(C.c_uint32), C.POINTER(C.c_uint32), C.c_uint32, C.c_char_p, C.c_uint32,
                                C.POINTER(_CRegion), C.c_uint32, C.POINTER(C.c_int64), C.c_uint32]
        _lib = L
    return _lib


def _take(p):
    s = C.string_at(p).decode("utf-8", "replace"); _lib.pe_free(p); return s


# ------------------------------------------------------------------------------------------------ arguments
class ReadOnly:
    """Wrap a buffer argument: any write to it is an error."""
    def __init__(self, x): self.x = x


class Uninit:
    """Wrap a buffer argument (e.g. torch.empty): reading a byte before some thread wrote it is an error."""
    def __init__(self, x): self.x = x


class DevPtr:
    """Pointer argument with a byte offset into a buffer: DevPtr(arr, 64)."""
    def __init__(self, x, offset=0): self.x, self.offset = x, offset


class PtrTable:
    """Pointer argument to a device array of pointers: PtrTable([a, b, None])."""
    def __init__(self, xs): self.xs = list(xs)


class Struct:
    """By-value struct argument: Struct(('Q', arr), ('i', 5), ('f', 1.0), ...) using struct format codes with C alignment."""
    def __init__(self, *fields): self.fields = fields


def _is_torch(x):
    return type(x).__module__.split(".")[0] == "torch" and hasattr(x, "data_ptr")


def _span(x):
    """(storage_base, storage_bytes, lo, hi) of a numpy array / torch tensor, lo/hi = byte offsets of the elements it covers."""
    if _is_torch(x):
        if x.device.type != "cpu": raise TypeError("torch tensor must be on the CPU")
        st = x.untyped_storage(); base, n = st.data_ptr(), st.nbytes(); lo = x.data_ptr() - base
        if x.numel() == 0: return base, n, lo, lo
        ext = sum((s - 1) * t for s, t in zip(x.shape, x.stride()) if s > 0)
        neg = 0
        return base, n, lo + neg, lo + (ext + 1) * x.element_size()
    a = x; b = a
    while isinstance(b.base, np.ndarray): b = b.base
    bl, bh = np.lib.array_utils.byte_bounds(b) if hasattr(np.lib, "array_utils") else np.byte_bounds(b)
    l, h = np.lib.array_utils.byte_bounds(a) if hasattr(np.lib, "array_utils") else np.byte_bounds(a)
    if a.size == 0: l = h = a.ctypes.data
    return bl, bh - bl, l - bl, h - bl


class _Mapper:
    def __init__(self):
        self.regs = {}; self.order = []; self.keep = []

    def add(self, x, name, flags):
        if not _is_torch(x) and not isinstance(x, np.ndarray): raise TypeError("buffer argument %s: %r" % (name, type(x)))
        base, n, lo, hi = _span(x)
        r = self.regs.get(base)
        if r is None:
            r = self.regs[base] = dict(base=base, size=n, iv=[], names=[], flags=0, slot=len(self.order) + 1); self.order.append(r)
        r["size"] = max(r["size"], n)
        r["iv"].append((lo, hi)); r["names"].append(name); r["flags"] |= flags; self.keep.append(x)
        start = (x.data_ptr() if _is_torch(x) else x.ctypes.data) - base
        return (r["slot"] << 36) + start

    def cregions(self):
        arr = (_CRegion * max(1, len(self.order)))()
        for c, r in zip(arr, self.order):
            iv = []
            for lo, hi in sorted(r["iv"]):
                if hi <= lo: continue
                if iv and lo <= iv[-1][1]: iv[-1][1] = max(iv[-1][1], hi)
                else: iv.append([lo, hi])
            if not iv: iv = [[0, 0]]
            flat = (C.c_uint64 * (2 * len(iv)))(*[v for p in iv for v in p]); self.keep.append(flat)
            c.va = r["slot"] << 36; c.size = r["size"]; c.host = r["base"]; nm = "+".join(r["names"]).encode(); self.keep.append(nm)
            c.name = nm; c.niv = len(iv); c.iv = flat; c.flags = r["flags"]
        return arr


# ------------------------------------------------------------------------------------------------ stats
class Stats(dict):
    """Result of a launch: a dict with attribute access; see README for the fields."""
    __getattr__ = dict.__getitem__

    def _eff(self, k):
        g = self[k]; return g["unique_bytes"] / (32.0 * g["sectors"]) if g["sectors"] else 1.0

    @property
    def load_efficiency(self): return self._eff("global_ld")

    @property
    def store_efficiency(self): return self._eff("global_st")

    @property
    def compulsory_read_bytes(self): return 32 * self["unique_read_sectors"]

    @property
    def compulsory_write_bytes(self): return 32 * self["unique_write_sectors"]

    @property
    def mma_flops(self): return sum(v[1] for v in self["mma"].values())

    @property
    def bank_conflicts(self): return self["shared_ld"]["conflicts"] + self["shared_st"]["conflicts"]

    def summary(self):
        s = ["warp insns %d, thread insns %d, blocks %d" % (self["warp_insns"], self["thread_insns"], self["blocks"])]
        s.append("classes (thread): " + ", ".join("%s %d" % (k, v[1]) for k, v in self["classes"].items()))
        for k, v in self["mma"].items(): s.append("mma %s: %d warp ops, %.3f MFLOP" % (k, v[0], v[1] / 1e6))
        for k in ("global_ld", "global_st", "global_atom"):
            g = self[k]
            if g["requests"]: s.append("%s: %d requests, %d sectors (%.1f KiB), bytes used %d, efficiency %.1f%%" % (k, g["requests"], g["sectors"], g["sectors"] / 32., g["unique_bytes"], 100 * self._eff(k)))
        s.append("compulsory traffic: read %.1f KiB, write %.1f KiB" % (self.compulsory_read_bytes / 1024., self.compulsory_write_bytes / 1024.))
        for k in ("shared_ld", "shared_st"):
            g = self[k]
            if g["requests"]: s.append("%s: %d requests, wavefronts %d, bank conflicts %d" % (k, g["requests"], g["wavefronts"], g["conflicts"]))
        if self["race_count"]: s.append("RACES: %d" % self["race_count"])
        if self["global_ww_conflicts"]: s.append("global write-write conflicts: %d" % self["global_ww_conflicts"])
        return "\n".join(s)


_PK = {"u8": "B", "s8": "b", "b8": "B", "u16": "H", "s16": "h", "b16": "H", "u32": "I", "s32": "i", "b32": "I", "u64": "Q", "s64": "q", "b64": "Q", "f32": "f", "f64": "d", "f16": "e"}


class KernelInfo:
    def __init__(self, d): self.__dict__.update(d)

    def __repr__(self): return "<kernel %s(%s)>" % (self.name, ", ".join("%s %s" % (("ptr " if p["ptr"] else "") + p["type"] + ("[%d]" % p["size"] if p["array"] else ""), p["name"]) for p in self.params))


class Module:
    def __init__(self, ptx_text):
        if isinstance(ptx_text, bytes): ptx_text = ptx_text.decode()
        L = _load(); err = C.c_void_p()
        self._h = L.pe_create(ptx_text.encode(), C.byref(err))
        if not self._h: raise PtxEmuError("PTX parse error: " + _take(err.value))
        self.ptx = ptx_text; info = json.loads(_take(L.pe_info(self._h)))
        self.target, self.version, self.globals = info["target"], info["version"], {g["name"]: g for g in info["globals"]}
        self.kernels = {k["name"]: KernelInfo(k) for k in info["kernels"]}

    def __del__(self):
        if getattr(self, "_h", None) and _lib is not None: _lib.pe_destroy(self._h); self._h = None

    def global_view(self, name, dtype=np.uint8):
        """numpy view of a module-level __device__/__constant__ variable (read or write it before/after launches)."""
        g = self.globals[name]; p = _lib.pe_global_host(self._h, g["va"])
        buf = (C.c_uint8 * g["size"]).from_address(p); a = np.frombuffer(buf, dtype=np.uint8); self._keep = buf
        return a.view(dtype)

    @property
    def unsupported(self): return {k.name: k.unsupported for k in self.kernels.values() if k.unsupported or k.fatal}

    def _pack(self, p, v, mp, i):
        n, t = p["size"], p["type"]; name = "arg%d(%s)" % (i, p["name"])
        flags = 0
        while isinstance(v, (ReadOnly, Uninit)): flags |= 1 if isinstance(v, ReadOnly) else 2; v = v.x
        if isinstance(v, Struct):
            out = bytearray()
            for code, val in v.fields:
                if code == "Q" and not isinstance(val, (int, np.integer)):
                    val = mp.add(val.x, name, 0) + val.offset if isinstance(val, DevPtr) else (0 if val is None else mp.add(val, name, 0))
                sz = struct.calcsize("<" + code)
                while len(out) % sz: out.append(0)
                out += struct.pack("<" + code, val)
            b = bytes(out)
            if len(b) > n: raise PtxEmuError("%s: struct of %d bytes for a %d-byte parameter" % (name, len(b), n))
            return b.ljust(n, b"\0")
        if p["array"]:
            if isinstance(v, (bytes, bytearray)): b = bytes(v)
            elif isinstance(v, np.generic) or isinstance(v, np.ndarray): b = v.tobytes()
            elif isinstance(v, float) and n == 2: b = np.float16(v).tobytes()
            else: raise PtxEmuError("%s: by-value struct parameter needs bytes / numpy record / Struct" % name)
            if len(b) > n: raise PtxEmuError("%s: %d bytes for a %d-byte parameter" % (name, len(b), n))
            return b.ljust(n, b"\0")
        if v is None: return bytes(n)
        if isinstance(v, PtrTable):
            tab = np.array([0 if x is None else mp.add(x, "%s[%d]" % (name, j), 0) for j, x in enumerate(v.xs)], np.uint64); return struct.pack("<Q", mp.add(tab, name, 1))
        if isinstance(v, DevPtr): return struct.pack("<Q", mp.add(v.x, name, flags) + v.offset)
        if _is_torch(v) or (isinstance(v, np.ndarray) and v.ndim >= 0 and not isinstance(v, np.generic)):
            if n != 8: raise PtxEmuError("%s: array given for a %d-byte scalar parameter" % (name, n))
            return struct.pack("<Q", mp.add(v, name, flags))
        if isinstance(v, (bytes, bytearray)): return bytes(v).ljust(n, b"\0")
        if isinstance(v, np.generic) and v.dtype.itemsize == n and (v.dtype.kind == "f" or t[0] != "f") and v.dtype.kind in "fiub": return v.tobytes()
        if t[0] == "f": return struct.pack("<" + _PK[t], float(v))
        if isinstance(v, (float, np.floating)):
            if t[0] == "b": return struct.pack({4: "<f", 8: "<d", 2: "<e"}[n], float(v))
            raise PtxEmuError("%s: float given for integer parameter of type .%s" % (name, t))
        return (int(v) & ((1 << 8 * n) - 1)).to_bytes(n, "little")

    def launch(self, kernel, grid, block, args, shared_bytes=0, *, races="raise", uninit_shared=True, uninit_local=True, poison=True, stats=True,
               global_races=True, order="sequential", resident_blocks=1, random_schedule=False, seed=1, max_warp_insns=400_000_000, per_line=False,
               allow_unsupported=False, extra=()):
        k = self.kernels[kernel] if kernel is not None else next(iter(self.kernels.values()))
        if k.fatal: raise Unsupported("kernel %s: %s" % (k.name, k.fatal))
        if k.unsupported and not allow_unsupported:
            raise Unsupported("kernel %s uses unsupported PTX:\n  " % k.name + "\n  ".join("line %d: %s   [%s]" % (l, w, t.strip()) for l, w, t in k.unsupported[:20]))
        t3 = lambda g: tuple(int(x) for x in ((g,) if isinstance(g, (int, np.integer)) else tuple(g))) 
        grid = (t3(grid) + (1, 1, 1))[:3]; block = (t3(block) + (1, 1, 1))[:3]
        if any(k.reqntid) and tuple(k.reqntid) != block: raise PtxEmuError("kernel %s requires block %s, launched with %s" % (k.name, k.reqntid, block))
        if k.maxntid and block[0] * block[1] * block[2] > k.maxntid: raise PtxEmuError("block larger than .maxntid %d" % k.maxntid)
        if grid[1] > 65535 or grid[2] > 65535 or min(grid) < 1 or grid[0] > 2**31 - 1: raise PtxEmuError("bad grid %s" % (grid,))
        args = list(args)
        if len(args) != len(k.params): raise PtxEmuError("kernel %s takes %d arguments (%s), got %d" % (k.name, len(k.params), ", ".join(p["type"] for p in k.params), len(args)))
        mp = _Mapper(); pb = bytearray(k.param_bytes)
        for i, (p, v) in enumerate(zip(k.params, args)): pb[p["offset"]:p["offset"] + p["size"]] = self._pack(p, v, mp, i)
        for i, e in enumerate(extra): mp.add(e, "extra%d" % i, 0)
        rg = mp.cregions()
        ro = {"off": 0, "record": 1, "raise": 1}[races]
        ul = {True: 1, False: 0, "warn": 2}[uninit_local]
        op = [ro, int(bool(uninit_shared)), ul, int(poison), int(stats), int(global_races), {"sequential": 0, "reverse": 1, "random": 2}[order], resident_blocks, int(random_schedule), max_warp_insns, seed, int(per_line)]
        J = _take(_lib.pe_launch(self._h, k.name.encode(), (C.c_uint32 * 3)(*grid), (C.c_uint32 * 3)(*block), int(shared_bytes), bytes(pb), len(pb), rg, len(mp.order), (C.c_int64 * len(op))(*op), len(op)))
        st = Stats(json.loads(J)); st["kernel"] = k.name; st["grid"] = grid; st["block"] = block
        if "error" in st:
            e = _KINDS.get(st["kind"], PtxEmuError)("[%s] %s" % (st["kind"], st["error"])); e.kind = st["kind"]; e.stats = st; raise e
        if st["races"] and races == "raise":
            r = st["races"][0]
            e = RaceError("[race] shared-memory race in kernel %s: %s at shared offset %d, block %d, warp %d (PTX line %d: '%s') vs warp %d (PTX line %d: '%s'); %d distinct pairs, %d events" % (
                k.name, r["kind"], r["shared_offset"], r["block"], r["warp1"], r["line1"], r["text1"].strip(), r["warp2"], r["line2"], r["text2"].strip(), len(st["races"]), st["race_count"]))
            e.kind = "race"; e.stats = st; raise e
        return st


# ------------------------------------------------------------------------------------------------ getting PTX
def nvcc_ptx(src, arch="sm_80", includes=(), defines=None, flags=(), cache=True):
    """Compile CUDA C++ (a path or source text) to PTX text with nvcc."""
    is_path = "\n" not in src and os.path.exists(src)
    text = open(src).read() if is_path else src
    dd = dict(defines or {})
    cmd = ["nvcc", "-arch=%s" % arch, "-O3", "-std=c++17", "-ptx", "-lineinfo", *["-I%s" % i for i in includes], *["-D%s" % k if v is None else "-D%s=%s" % (k, v) for k, v in dd.items()], *flags]
    if is_path: cmd.append("-I%s" % os.path.dirname(os.path.abspath(src)))
    cdir = os.path.join(os.environ.get("PTXEMU_CACHE") or os.path.expanduser("~/.cache/ptxemu"), "nvcc"); key = hashlib.sha256((text + "\0" + " ".join(cmd)).encode()).hexdigest()[:24]
    cf = os.path.join(cdir, key + ".ptx")
    # the cache key covers only the top-level text: disable it when local headers may change
    use = cache and not includes and not is_path
    if use and os.path.exists(cf): return open(cf).read()
    with tempfile.TemporaryDirectory(prefix="ptxemu") as d:
        f = src if is_path else os.path.join(d, "k.cu")
        if not is_path: open(f, "w").write(text)
        o = os.path.join(d, "k.ptx")
        r = subprocess.run([*cmd, f, "-o", o], capture_output=True, text=True)
        if r.returncode: raise RuntimeError("nvcc failed:\n" + r.stdout[-2000:] + r.stderr[-6000:])
        ptx = open(o).read()
    if use:
        try: os.makedirs(cdir, exist_ok=True); open(cf, "w").write(ptx)
        except OSError: pass
    return ptx


def from_nvcc(src, arch="sm_80", includes=(), defines=None, flags=()):
    return Module(nvcc_ptx(src, arch, includes, defines, flags))


class TritonKernel:
    """Compiled Triton kernel: .module .name .shared .num_warps .arg_names (runtime args, in order) .hidden (number of hidden scratch pointers)."""
    def __init__(self, ck, arg_names, ptx, raw):
        md = ck.metadata; self.ptx = ptx; self.name = md.name; self.shared = md.shared; self.num_warps = md.num_warps
        self.module = Module(ptx); self.arg_names = arg_names; self.metadata = md; self.compiled = raw
        k = self.module.kernels[self.name]; self.params = k.params; self.hidden = len(k.params) - len(arg_names)
        if self.hidden < 0: raise PtxEmuError("Triton kernel has %d params for args %s" % (len(k.params), arg_names))
        if getattr(md, "global_scratch_size", 0): raise PtxEmuError("kernel needs %d bytes of Triton global scratch" % md.global_scratch_size)

    @property
    def block(self):
        r = self.module.kernels[self.name].reqntid
        return tuple(r) if any(r) else (32 * self.num_warps, 1, 1)

    def launch(self, grid, args, **kw):
        if isinstance(args, dict): args = [args[n] for n in self.arg_names]
        args = list(args)
        if len(args) != len(self.arg_names): raise PtxEmuError("expected args %s, got %d values" % (self.arg_names, len(args)))
        return self.module.launch(self.name, grid, self.block, args + [None] * self.hidden, self.shared, **kw)


def from_triton(kernel_fn, signature, constexprs, num_warps=4, num_stages=3, arch=80, attrs=None, **options):
    """Compile a @triton.jit function offline for sm_<arch>.  signature: {arg: '*fp32'|'i32'|...} for the runtime args; constexprs: {arg: value}.
    attrs: {arg_name: 16} marks arguments as divisible by 16 (what Triton's launcher specialises on)."""
    import triton
    from triton.compiler import ASTSource
    from triton.backends.compiler import GPUTarget
    names = list(getattr(kernel_fn, "arg_names", None) or [p.name for p in kernel_fn.params])
    sig = {}
    for n in names:
        if n in constexprs: sig[n] = "constexpr"
        elif n in signature: sig[n] = signature[n]
        else: raise KeyError("no signature/constexpr for kernel argument %r" % n)
    kw = {}
    if attrs: kw["attrs"] = {(names.index(n),): [["tt.divisibility", int(v)]] for n, v in attrs.items()}
    src = ASTSource(fn=kernel_fn, signature=sig, constexprs={(names.index(k),): v for k, v in constexprs.items()} if attrs else dict(constexprs), **kw)
    ck = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=num_warps, num_stages=num_stages, **options))
    return TritonKernel(ck, [n for n in names if sig[n] != "constexpr"], ck.asm["ptx"], ck)
