// Runs a file of `simomerge export` on one picture with the C++ interface of ONNX Runtime, without Python.
//
//   g++ -std=c++17 -O2 scene.cpp -I ONNXRUNTIME/include -L ONNXRUNTIME/lib -lonnxruntime -o scene
//   ./scene scene.onnx picture.ppm out
//
// The picture is a binary PPM file (P6, 8 bits) of the size that the file was exported for; `convert photo.jpg
// -resize 640x480! picture.ppm` makes one. Every output is written as out/TASK.npy, which numpy.load reads: class
// numbers as int64, all else as float32.

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <onnxruntime_cxx_api.h>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture {
    int64_t height = 0, width = 0;
    std::vector<uint8_t> bytes;  // RGB, row by row
};

Picture read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string kind;
    int64_t largest = 0;
    Picture picture;
    file >> kind >> picture.width >> picture.height >> largest;
    file.get();  // one character separates the header from the pixels
    if (!file || kind != "P6" || largest != 255 || picture.width < 1 || picture.height < 1)
        throw std::runtime_error(path + ": not a binary PPM file (P6) with 8 bits and no comments");
    picture.bytes.resize(3 * picture.height * picture.width);
    file.read(reinterpret_cast<char*>(picture.bytes.data()), picture.bytes.size());
    if (!file) throw std::runtime_error(path + ": the file ends before its pixels do");
    return picture;
}

// Version 1 of the format of numpy: magic, length of the header, header, values.
void write_npy(const std::filesystem::path& path, const Ort::Value& value) {
    auto info = value.GetTensorTypeAndShapeInfo();
    const bool labels = info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    std::string shape;
    for (int64_t side : info.GetShape()) shape += std::to_string(side) + ", ";
    std::string header = std::string("{'descr': '") + (labels ? "<i8" : "<f4") +
                         "', 'fortran_order': False, 'shape': (" + shape + "), }";
    header.append(63 - (10 + header.size()) % 64, ' ').push_back('\n');
    const auto length = static_cast<uint16_t>(header.size());
    const char start[10] = {'\x93', 'N', 'U', 'M', 'P', 'Y', 1, 0, static_cast<char>(length & 255),
                            static_cast<char>(length >> 8)};
    std::ofstream file(path, std::ios::binary);
    file.write(start, sizeof start);
    file << header;
    file.write(reinterpret_cast<const char*>(value.GetTensorRawData()),
               info.GetElementCount() * (labels ? sizeof(int64_t) : sizeof(float)));
    if (!file) throw std::runtime_error(path.string() + ": cannot be written");
}

void run(const std::string& model, const std::string& image, const std::filesystem::path& folder) {
    Ort::Env environment(ORT_LOGGING_LEVEL_WARNING, "scene");
    Ort::Session session(environment, std::filesystem::path(model).c_str(), Ort::SessionOptions{});
    Ort::AllocatorWithDefaultOptions allocator;
    if (session.GetInputCount() != 1)
        throw std::runtime_error(model + ": not a whole scene; a head of a split export runs after its encoder");
    auto about = session.GetInputTypeInfo(0);
    const auto wanted = about.GetTensorTypeAndShapeInfo();
    if (wanted.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8)
        throw std::runtime_error(model + ": takes floats; this example needs an export with the layout of bytes");

    Picture picture = read_ppm(image);
    const std::vector<int64_t> shape = {1, picture.height, picture.width, 3};
    for (size_t side : {1, 2})
        if (int64_t size = wanted.GetShape()[side]; size > 0 && size != shape[side])
            throw std::runtime_error(image + ": " + std::to_string(picture.height) + " x " +
                                     std::to_string(picture.width) + " pixels, and the model takes " +
                                     std::to_string(wanted.GetShape()[1]) + " x " +
                                     std::to_string(wanted.GetShape()[2]));
    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    Ort::Value input = Ort::Value::CreateTensor<uint8_t>(memory, picture.bytes.data(), picture.bytes.size(),
                                                         shape.data(), shape.size());

    std::vector<std::string> names;
    std::vector<const char*> outputs;
    for (size_t each = 0; each < session.GetOutputCount(); ++each)
        names.emplace_back(session.GetOutputNameAllocated(each, allocator).get());
    for (const auto& name : names) outputs.push_back(name.c_str());
    const char* inputs[] = {"image"};

    const auto began = std::chrono::steady_clock::now();
    auto found = session.Run(Ort::RunOptions{nullptr}, inputs, &input, 1, outputs.data(), outputs.size());
    const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - began;

    std::filesystem::create_directories(folder);
    for (size_t each = 0; each < names.size(); ++each) write_npy(folder / (names[each] + ".npy"), found[each]);
    std::cout << names.size() << " outputs in " << folder << ", " << spent.count() << " ms\n";
}

int main(int count, char** arguments) {
    if (count != 4) {
        std::cerr << "usage: scene MODEL.onnx PICTURE.ppm FOLDER\n";
        return 2;
    }
    try {
        run(arguments[1], arguments[2], arguments[3]);
    } catch (const std::exception& error) {
        std::cerr << "Error: " << error.what() << "\n";
        return 2;
    }
    return 0;
}
